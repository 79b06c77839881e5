"""What the launcher says at a start, on the terminal and in RUN/logs/run.log; nothing is started here."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from exprl_megatron.config.load import check_config
from exprl_megatron.launch import launcher as module
from exprl_megatron.runs.directory import RunDirectory


class Supervisor:
    """Servers of two models."""

    def __init__(self, *_):
        names = {"policy-0": "m", "policy-1": "m", "judge-0": "j"}
        self.specs = [SimpleNamespace(name=name, model=model) for name, model in names.items()]

    def start(self):
        pass

    stop = poll = start


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A run of which nothing is started, whose code has the hash `new`."""

    @contextmanager
    def starter(*_, **__):
        yield None

    ranks = SimpleNamespace(running=lambda: False, stop=lambda: None)
    for name, value in {
        "starter": starter,
        "hash_checked_inputs": lambda *_: {"plugins.mine:score": "new"},
        "assign_server_gpus": lambda wanted, _: wanted,
        "ServerSupervisor": Supervisor,
        "TrainerRanks": lambda *_: ranks,
        "stop_on_sigusr1": lambda: None,
        "request_stop_on_sigusr1": lambda _: None,
    }.items():
        monkeypatch.setattr(module, name, value)
    # What the launcher gives to its children is not left behind.
    monkeypatch.setenv(module.STARTED, "")
    monkeypatch.setattr(module, "gloo_on_loopback", lambda _: {})
    stage = {"kind": "sparse-rl", "steps": 1, "problems": {"source": "p.jsonl"}}
    policy = {"model": "m", "layout": {"tp": 2}}
    return check_config({"directory": str(tmp_path / "run"), "policy": policy, "stages": [stage]}, "test")


def test_a_start_says_what_it_checks_what_it_starts_and_where_logs_are_and_keeps_every_line(config, capsys):
    module.launch(config, resume=False)
    paths = RunDirectory(config.directory)
    said = [line.partition("] ")[2] for line in capsys.readouterr().out.splitlines()]
    expected = [
        f"checking {config.directory}: models, problems and prompts",
        f"starting policy-0, policy-1 (m), judge-0 (j); logs in {paths.logs}",
        "starting 2 trainer processes",
    ]
    assert [line for line in said if line in expected] == expected
    kept = [line.partition("] ")[2] for line in paths.run_log.read_text().splitlines()]
    assert kept == said


def test_a_resumed_run_whose_own_code_has_changed_says_so(config, capsys):
    module.launch(config, resume=False)
    paths = RunDirectory(config.directory)
    paths.metrics.write_text("{}\n")
    assert json.loads(paths.inputs.read_text()) == {"plugins.mine:score": "new"}
    module.launch(config, resume=True)
    assert "has changed" not in capsys.readouterr().err
    paths.inputs.write_text(json.dumps({"plugins.mine:score": "old"}))
    module.launch(config, resume=True)
    assert "The source of mine:score has changed" in capsys.readouterr().err
