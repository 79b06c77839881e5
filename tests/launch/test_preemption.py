"""A run that is asked to stop ends soon, at a place to continue from; test_runs.py compares what it then learns."""

import asyncio
import json
import signal
import subprocess
import sys
import threading

import psutil
import pytest
import torch.distributed as dist
import yaml
from helpers.processes import family, left_behind, wait_until

from exprl_megatron.config.load import check_config
from exprl_megatron.policy.checkpoint import read_extra
from exprl_megatron.policy.checkpoint_files import checkpoints
from exprl_megatron.runs.directory import RunDirectory
from exprl_megatron.weight_sync.coordinator import RankCoordinator


@pytest.fixture
def asked():
    """Whether the coordinator's run is asked to stop."""
    return threading.Event()


@pytest.fixture
def coordinator(asked):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    coordinator = RankCoordinator(60.0, asked.is_set)
    yield coordinator
    coordinator.close()
    dist.destroy_process_group()


def test_a_long_wait_is_given_up_when_the_run_is_asked_to_stop(coordinator, asked):
    exit_error = []

    async def forever():
        asked.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            exit_error.append("cancelled")
            raise

    assert not coordinator.run_unless_asked_to_stop(forever())
    coordinator.run(asyncio.sleep(0))
    assert exit_error == ["cancelled"]
    assert coordinator.asked_to_stop()


def test_what_comes_to_its_end_counts_and_what_fails_raises(coordinator):
    async def fail():
        raise TimeoutError("no answer")

    assert coordinator.run_unless_asked_to_stop(asyncio.sleep(0))
    with pytest.raises(TimeoutError, match="no answer"):
        coordinator.run_unless_asked_to_stop(fail())
    assert not coordinator.asked_to_stop()


@pytest.mark.slow
def test_sigusr1_to_all_processes_of_a_run_ends_it_with_a_checkpoint_and_status_75(tiny_model, tmp_path):
    examples = tmp_path / "examples.jsonl"
    examples.write_text(json.dumps({"prompt": "1 + 1 =", "completion": "2"}) + "\n")
    tree = {
        "directory": str(tmp_path / "run"),
        "policy": {"model": str(tiny_model("qwen3")), "layout": {"tp": 2}, "max_tokens": 64},
        "checkpoint": {"every_steps": 1_000_000},
        "stages": [{"kind": "sft", "name": "learn", "steps": 1_000_000, "batch_size": 1, "examples": str(examples)}],
    }
    paths, config = RunDirectory(tmp_path / "run"), tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(check_config(tree, "test").model_dump(mode="json")))
    command = [sys.executable, "-m", "exprl_megatron.cli", "train", str(config)]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: paths.metrics.is_file() or run.poll() is not None, 300)
    # As Slurm does: to every process of the job's step.
    everyone = [psutil.Process(run.pid), *family(run.pid)]
    for process in everyone:
        process.send_signal(signal.SIGUSR1)
    _, found = run.communicate(timeout=300)
    assert run.returncode == 75
    step = read_extra(checkpoints(paths.checkpoints)[-1])["step"]
    assert found.endswith(
        f"exprl: The run was asked to stop and did so after step {step} of learn, with a checkpoint; "
        "continue with --resume.\n"
    )
    assert paths.metrics.read_text().count("\n") == step
    assert not left_behind(everyone)
