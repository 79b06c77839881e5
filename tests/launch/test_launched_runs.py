"""`exprl train` as a user runs it: what happens to its processes when one of them dies."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.processes import family, left_behind, wait_until
from helpers.runs import command_words, run_config, write_problems

from exprl_megatron.runs.directory import RunDirectory

pytestmark = pytest.mark.slow


def start(config, *flags: str) -> subprocess.Popen:
    path = Path(config.directory).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "exprl_megatron.cli", "train", str(path), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def steps_done(config) -> int:
    metrics = RunDirectory(config.directory).metrics
    return metrics.read_text().count("\n") if metrics.is_file() else 0


@pytest.fixture(scope="module")
def config(tiny_model, tmp_path_factory):
    """A run far too long to end by itself, which restarts no server."""
    root = tmp_path_factory.mktemp("launched")
    problems = write_problems(root / "problems.jsonl")
    config = run_config(root / "run", tiny_model("qwen3"), tiny_model("qwen3", seed=1, tied=True), problems)
    prime = config.stages[0].model_copy(update={"steps": 100_000})
    once = config.server.model_copy(update={"restarts": 0})
    return config.model_copy(update={"stages": (prime,), "server": once})


def test_a_server_that_died_once_too_often_ends_the_run_with_its_name_and_log(config):
    run = start(config)
    wait_until(lambda: steps_done(config) >= 1 or run.poll() is not None, 300)
    everyone = family(run.pid)
    commands = {process: command_words(process) for process in everyone}
    servers = [p for p, words in commands.items() if words[2:3] == ["exprl_megatron.serving.keyed_server"]]
    judge_or_policy = {commands[p][commands[p].index("--model-path") + 1]: p for p in servers}
    judge_or_policy[config.policy.model].kill()
    _, found = run.communicate(timeout=300)
    assert run.returncode == 1
    assert "exprl: policy-0 (http://127.0.0.1:" in found
    assert "policy-0.log; its last lines:" in found
    assert not left_behind(everyone)


def test_kill_9_of_the_launcher_leaves_no_process_behind(config):
    done = steps_done(config)
    run = start(config, "--resume")
    wait_until(lambda: steps_done(config) > done or run.poll() is not None, 300)
    everyone = family(run.pid)
    assert len(everyone) >= 8
    run.kill()
    assert not left_behind(everyone)
    run.communicate()
