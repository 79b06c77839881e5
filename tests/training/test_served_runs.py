"""`exprl serve` and `exprl train --servers registered`, as a job script runs them side by side."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from helpers.processes import family, left_behind, wait_until
from helpers.runs import run_config, write_problems

from exprl_megatron.runs.directory import RunDirectory
from exprl_megatron.serving.registry import Registry

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tiny_model, tmp_path_factory):
    """One step of sparse-reward RL; the servers' failures are bounded."""
    root = tmp_path_factory.mktemp("served")
    problems = write_problems(root / "problems.jsonl")
    whole = run_config(root / "run", tiny_model("qwen3"), tiny_model("qwen3", seed=1, tied=True), problems)
    sparse = whole.stages[1].model_copy(update={"steps": 1})
    config = whole.model_copy(update={"stages": (sparse,)})
    (root / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return config


def exprl(command: str, config, *flags: str) -> subprocess.Popen:
    path = Path(config.directory).with_name("config.yaml")
    whole = [sys.executable, "-m", "exprl_megatron.cli", command, str(path), *flags]
    return subprocess.Popen(whole, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_run_learns_from_servers_that_another_command_keeps(config):
    registry = Registry(RunDirectory(config.directory).registry)
    registry.mark_ended()  # of an earlier attempt: nobody minds
    serving = exprl("serve", config)
    training = exprl("train", config, "--servers", "registered")
    try:
        wait_until(lambda: registry.all() or serving.poll() is not None, 900)
        (first,) = registry.all()
        assert first.name == "policy-0" and socket.gethostname() in first.url
        started = family(serving.pid)
        _, told = training.communicate(timeout=900)
        assert training.returncode == 0, told
        assert RunDirectory(config.directory).metrics.read_text().count("\n") == 1
        assert serving.wait(120) == 0, serving.stderr.read()
        assert not left_behind(started) and registry.all() == []
    finally:
        for process in (training, serving):
            process.kill()
            process.communicate()


def test_a_dead_server_is_restarted_and_registered_again_and_sigterm_ends_all(config):
    registry = Registry(RunDirectory(config.directory).registry)
    serving = exprl("serve", config, "server.restarts=1")
    try:
        wait_until(lambda: registry.all() or serving.poll() is not None, 900)
        (first,) = registry.all()
        os.kill(_server_process(serving), signal.SIGKILL)
        wait_until(lambda: registry.all() not in ([], [first]) or serving.poll() is not None, 900)
        (second,) = registry.all()
        assert second.name == first.name and second.instance_id != first.instance_id
        started = family(serving.pid)
        serving.terminate()
        serving.communicate(timeout=300)
        assert not left_behind(started) and registry.all() == []
    finally:
        serving.kill()
        serving.communicate()


def test_a_command_without_servers_to_keep_says_so(config):
    serving = exprl("serve", config, "--kind", "judge")
    _, told = serving.communicate(timeout=300)
    assert serving.returncode == 2
    assert "--kind is judge, but no stage of this config needs such a server" in told


def _server_process(serving: subprocess.Popen) -> int:
    """The process of SGLang's server below its supervisor."""
    (supervisor,) = psutil.Process(serving.pid).children()
    (server,) = supervisor.children()
    return server.pid
