"""Small complete runs for tests: a tiny policy at TP2 under a tiny judge, on problems made here."""

import json
from collections.abc import Callable
from pathlib import Path

import psutil

from exprl_megatron.config.load import check_config
from exprl_megatron.config.run import RunConfig
from exprl_megatron.launch.ranks import TrainerRanks
from exprl_megatron.processes.descendants import child_pids, existing
from exprl_megatron.runs.directory import RunDirectory
from exprl_megatron.serving.keys import ensure_key, fingerprint, read_key
from exprl_megatron.serving.registry import RegisteredServer, Registry
from exprl_megatron.serving.server_process import Server
from helpers.forking import starter
from helpers.processes import family, left_behind, wait_until

SAMPLING = {"temperature": 1.0, "max_new_tokens": 24}


def write_problems(path: Path, count: int = 12) -> Path:
    records = [
        {"id": f"p{i}", "problem": f"What is {i} plus 1?", "reference": f"{i} + 1 = {i + 1}", "answer": str(i + 1)}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run_config(directory: Path, model: Path, judge: Path, problems: Path, **changes) -> RunConfig:
    """Return three steps of ExpRL-Outcome and two of sparse-reward RL, a checkpoint after each step."""
    shared = {
        "problems": {"source": str(problems)},
        "problems_per_step": 2,
        "group_size": 3,
        "sampling": SAMPLING,
        "optimizer": {"lr": 1e-3},
    }
    tree = {
        "directory": str(directory),
        "seed": 3,
        "policy": {"model": str(model), "layout": {"tp": 2}, "max_tokens": 160},
        "judge": {
            "model": str(judge),
            "prompt": "miniature",
            "prefix_prompt": "miniature",
            "score_format": "constrained",
            "max_new_tokens": 12,
        },
        "sync": {"max_log_prob_gap": 1e-4},
        "checkpoint": {"every_steps": 1, "keep": 2},
        "stages": [
            {"kind": "exprl-outcome", "name": "prime", "steps": 3, "overlong": "score"} | shared,
            {"kind": "sparse-rl", "name": "sparse", "steps": 2, "updates_per_step": 2} | shared,
        ],
    }
    return check_config(tree | changes, "test")


def held_out(problems: Path, every_steps: int) -> dict:
    """Return an evaluation of two of the problems, sampled in another way than a stage's."""
    return {
        "problems": {"source": str(problems), "limit": 2},
        "every_steps": every_steps,
        "samples": 2,
        "k": [1],
        "sampling": {"temperature": 0.7, "top_k": 20, "max_new_tokens": 8},
    }


def start_ranks(config: RunConfig, servers: dict[str, Server], resume: bool = False) -> TrainerRanks:
    """Return the trainer's processes on servers that are already there."""
    directory = RunDirectory(config.directory)
    directory.claim(config, resume).release()
    registry = Registry(directory.registry)
    ensure_key(registry.key_file)
    run = fingerprint(read_key(registry.key_file))
    for kind, server in servers.items():
        log, key = str(server.log_file), str(server.key_file)
        registry.register(RegisteredServer(kind, f"{kind}-0", server.url, log, server.instance_id, run, key))
    return TrainerRanks(directory, config, directory.registry, starter=starter())


def finish(ranks: TrainerRanks, deadline_s: float = 300) -> None:
    """Wait until all ranks ended well; raises what ended them otherwise."""
    wait_until(lambda: not ranks.running(), deadline_s)


def kill_when(ranks: TrainerRanks, condition: Callable[[], bool], deadline_s: float = 300) -> None:
    """kill -9 of every rank at the first moment at which `condition` holds."""
    came = False

    def look() -> bool:
        # Once, as the moment may be over when the condition is looked at again.
        nonlocal came
        came = condition()
        return came or not ranks.running()

    wait_until(look, deadline_s)
    assert came, "the run ended before the moment came"
    workers = existing(worker for pid in ranks.pids for worker in child_pids(pid))
    started = [process for worker in workers for process in family(worker.pid)]
    for worker in workers:
        worker.kill()
    ranks.stop()
    left = left_behind(started)
    assert not left, f"left behind: {left}"


def command_words(process) -> list[str]:
    """Return the words of a psutil.Process's command, none where it has ended; behind a forked one's title are empty
    ones.
    """
    try:
        return " ".join(process.cmdline()).split()
    except psutil.NoSuchProcess:
        return []
