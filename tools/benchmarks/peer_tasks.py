"""The same step of sparse-reward RL for our trainer and for TRL's GRPOTrainer: what tools/bench_peer.py compares."""

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

import chains

PRIMED_ROWS, PRIMED_BATCH = 384, 64


@dataclass(frozen=True)
class Task:
    """One model and what a step does with it: each step samples all `problems`, in fp32, and takes one update.

    The learning rate is so small that all steps sample from nearly the same policy, and so traces of the same lengths.
    """

    name: str
    model: Path
    problems: Path
    problems_per_step: int
    group_size: int
    max_new_tokens: int
    temperature: float
    answer_pattern: str
    """Of TRL's reward: its last match in a trace is the answer. Ours is the stage's own verifier."""
    max_tokens: int
    micro_batch_tokens: int
    our_processes: int
    """Trainer ranks and servers: 2 of each with one thread, or 1 of each with two."""
    trl_processes: int
    """2 with one thread each, or 1 with two."""
    system: str | None = None
    learning_rate: float = 1e-6
    seed: int = 1


def threads(processes: int) -> int:
    """Threads of each process by the number of processes, on two cores."""
    return 2 // processes


def our_config(task: Task, directory: Path, steps: int) -> dict:
    """Return a run of one stage; trainer ranks take their threads from the environment."""
    stage = {
        "name": "sparse",
        "kind": "sparse-rl",
        "steps": steps,
        "problems": {"source": str(task.problems)},
        "problems_per_step": task.problems_per_step,
        "group_size": task.group_size,
        "sampling": {"temperature": task.temperature, "max_new_tokens": task.max_new_tokens},
        "optimizer": {"lr": task.learning_rate},
    }
    return {
        "directory": str(directory),
        "seed": task.seed,
        "policy": {
            "model": str(task.model),
            "layout": {"dp": task.our_processes},
            "max_tokens": task.max_tokens,
            "micro_batch_tokens": task.micro_batch_tokens,
        },
        "server": {
            "count": task.our_processes,
            "cpu_threads": threads(task.our_processes),
            "max_total_tokens": 32_768,
            "group_requests": True,
        },
        "checkpoint": {"every_steps": steps},
        **({} if task.system is None else {"prompt": {"system": task.system}}),
        "stages": [stage],
    }


def trl_task(task: Task, directory: Path, steps: int) -> dict:
    """Return the file that tools/peer/trl_grpo.py reads."""
    same = ("problems_per_step", "group_size", "max_new_tokens", "temperature", "answer_pattern", "system", "seed")
    return {
        **{name: getattr(task, name) for name in same},
        "model": str(task.model),
        "problems": str(task.problems),
        "learning_rate": task.learning_rate,
        "steps": steps,
        "threads": threads(task.trl_processes),
        "directory": str(directory),
    }


def write_problems(source: Path, count: int, path: Path) -> None:
    """The first `count` problems of `source`."""
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:count]), encoding="utf-8")


def priming_config(model: Path, examples: Path, directory: Path) -> dict:
    """Return a run that teaches the miniature's policy to work its chains to their end, as the demo's first stage does.

    The shipped policy mostly stops after one step of a chain, and so would time little but overhead.
    """
    stage = {
        "name": "prime",
        "kind": "sft",
        "steps": PRIMED_ROWS // PRIMED_BATCH,
        "examples": str(examples),
        "batch_size": PRIMED_BATCH,
        "optimizer": {"lr": 5.0e-4},
    }
    policy = {"model": str(model), "max_tokens": 160}
    return {"directory": str(directory), "policy": policy, "stages": [stage]}


def write_worked_chains(path: Path) -> None:
    """Examples of chains that are worked to their end."""
    rng = Random("bench peer")
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(PRIMED_ROWS):
            chain = chains.chain_problem(rng, rng.choice(chains.LONG))
            row = {"prompt": chains.problem_text(chain), "completion": chains.worked_text(chain)}
            file.write(json.dumps(row) + "\n")
