"""tools/bench_peer.py: both trainers get the same task, take turns, and are charged for their own time alone."""

import itertools
import json
import re
import runpy
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from benchmarks import peer_tasks
from benchmarks.turns import Contestant, StepCost, step_cost

from exprl_megatron.config.load import check_config
from exprl_megatron.errors import UserError
from exprl_megatron.reporting.timeline import Span

ROOT = Path(__file__).resolve().parents[2]
TRAINER = """
import json, subprocess, sys, time
worker = "import sys, time, json\\n" + '''
for step in range(1, 1000):
    span = {"stage": "s", "step": step, "name": "step", "start": time.time(), "end": time.time()}
    with open(sys.argv[1], "a") as file:
        file.write(json.dumps(span) + "\\\\n")
    sum(range(5_000_000))
    time.sleep(0.05)
'''
sys.exit(subprocess.run([sys.executable, "-S", "-c", worker, sys.argv[1]]).returncode)
"""


def _task(tmp_path):
    problems = tmp_path / "problems.jsonl"
    peer_tasks.write_problems(ROOT / "recipes/miniature/train.jsonl", 4, problems)
    return peer_tasks.Task(
        "miniature",
        ROOT / "recipes/miniature/policy",
        problems,
        problems_per_step=4,
        group_size=8,
        max_new_tokens=60,
        temperature=0.9,
        answer_pattern=r"ans (\d+)",
        max_tokens=160,
        micro_batch_tokens=512,
        our_processes=2,
        trl_processes=1,
        system="Add.",
    )


def _ends(process):
    """Whether it ends; one that was killed may be there for a moment, or until its parent asks for its status."""
    until = time.monotonic() + 60.0
    try:
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < until:
            time.sleep(0.01)
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_time_in_which_a_trainer_was_stopped_is_not_its_own():
    spans = [
        Span("s", 1, "train", 1.0, 9.0),
        Span("s", 2, "sync", 10.0, 13.0),
        Span("s", 2, "train", 15.0, 20.0),
        Span("s", 2, "step", 9.5, 20.0),
    ]
    found = step_cost(spans, [(2.0, 3.0), (10.5, 12.5), (16.0, 17.0), (19.0, 30.0)], 10.0, 20.0, 4.0)
    assert found == StepCost(wall_s=6.0, cpu_s=4.0, parts={"sync": 1.0, "train": 3.0})


def test_trainers_take_turns_and_those_that_wait_are_stopped(tmp_path):
    both = [
        Contestant(
            name,
            [sys.executable, "-S", "-c", TRAINER, str(tmp_path / name)],
            {},
            tmp_path / name,
            tmp_path / f"{name}.log",
        )
        for name in ("one", "two")
    ]
    processes = []
    with both[0], both[1]:
        for number in (1, 2, 3):
            for contestant in both:
                contestant.take_step(60.0)
                # The other one is where it was, and this one too from here on.
                states = [process.status() for each in both for process in each.processes() if number > 1]
                assert set(states) <= {psutil.STATUS_STOPPED}
                processes = [*both[0].processes(), *both[1].processes()]
    assert [len(contestant.costs) for contestant in both] == [2, 2]
    costs = [cost for contestant in both for cost in contestant.costs]
    assert sum(cost.cpu_s for cost in costs) > 0 and all(cost.wall_s > 0 for cost in costs)
    assert len(processes) == 4 and all(map(_ends, processes))


def test_no_process_is_missed_while_the_system_clock_is_adjusted(tmp_path, monkeypatch):
    # psutil adds the time of the boot by the system clock to each start time, here less from call to call.
    boot = psutil.boot_time()
    later = itertools.count()
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: boot - next(later))
    contestant = Contestant(
        "one", [sys.executable, "-S", "-c", TRAINER, str(tmp_path / "one")], {}, tmp_path / "one", tmp_path / "one.log"
    )
    with contestant:
        contestant.take_step(60.0)
        assert [process.status() for process in contestant.processes()] == [psutil.STATUS_STOPPED] * 2


def test_a_trainer_that_ends_is_named_with_its_last_words(tmp_path):
    command = [sys.executable, "-S", "-c", "raise SystemExit('no more memory')"]
    with (
        pytest.raises(UserError, match=r"(?s)ours ended with status 1.*no more memory"),
        Contestant("ours", command, {}, tmp_path / "timeline", tmp_path / "log") as contestant,
    ):
        contestant.take_step(60.0)


def test_both_trainers_get_the_same_step(tmp_path):
    task = _task(tmp_path)
    config = check_config(peer_tasks.our_config(task, tmp_path / "ours", 5), "ours")
    (stage,) = config.stages
    theirs = peer_tasks.trl_task(task, tmp_path / "trl", 5)
    assert theirs["steps"] == stage.steps == 5
    assert theirs["model"] == config.policy.model
    assert theirs["problems"] == stage.problems.source
    assert theirs["system"] == config.prompt.system
    assert theirs["learning_rate"] == stage.optimizer.lr
    assert {name: theirs[name] for name in ("max_new_tokens", "temperature")} == {
        name: getattr(stage.sampling, name) for name in ("max_new_tokens", "temperature")
    }
    assert (theirs["problems_per_step"], theirs["group_size"]) == (stage.problems_per_step, stage.group_size) == (4, 8)
    # Every step has all the problems, and each side two threads.
    assert len(Path(stage.problems.source).read_text().splitlines()) == stage.problems_per_step
    assert theirs["threads"] * task.trl_processes == 2
    assert config.policy.layout.world_size == config.server.count == 2 and config.server.cpu_threads == 1
    alone = check_config(peer_tasks.our_config(replace(task, our_processes=1), tmp_path / "ours", 5), "ours")
    assert alone.policy.layout.world_size == alone.server.count == 1 and alone.server.cpu_threads == 2
    script = (ROOT / "tools/peer/trl_grpo.py").read_text()
    assert set(re.findall(r'task\["(\w+)"\]', script)) == set(theirs)


def test_the_priming_run_is_one_that_the_trainer_takes(tmp_path):
    examples = tmp_path / "chains.jsonl"
    peer_tasks.write_worked_chains(examples)
    rows = [json.loads(line) for line in examples.read_text().splitlines()]
    config = check_config(
        peer_tasks.priming_config(ROOT / "recipes/miniature/policy", examples, tmp_path / "run"), "priming"
    )
    assert len(rows) == config.stages[0].steps * config.stages[0].batch_size
    assert all(row["completion"].split()[-2] == "ans" for row in rows)


def test_the_table_has_medians_and_how_many_times_as_fast_we_are(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    bench = runpy.run_path(str(ROOT / "tools" / "bench_peer.py"))
    ours = [StepCost(wall, 3.0, {"sample_and_grade": 1.0, "train": 0.5, "sync": 0.25}) for wall in (9.0, 2.0, 1.5)]
    theirs = [StepCost(wall, 4.5, {"sample_and_grade": 1.5, "train": 1.25}) for wall in (3.0, 3.0, 3.0)]
    costs = {"this project": ours, "TRL": theirs}
    *_, mine, other, speed = bench["table"]("miniature", costs, dict.fromkeys(costs, 700.0)).splitlines()
    assert mine == "| this project | 2.00 (1.50 to 9.00) | 1.00 | 0.50 | 0.25 | 0.25 | 3.00 | 700 |"
    assert other == "| TRL | 3.00 (3.00 to 3.00) | 1.50 | 1.25 | 0.00 | 0.25 | 4.50 | 700 |"
    assert speed == "this project's speed: 1.50 times TRL's by the clock, 1.50 by CPU time"


def test_the_environment_of_trl_is_locked_with_the_versions_of_ours():
    def pins(name):
        text = (ROOT / "requirements" / name).read_text()
        return dict(re.findall(r"^([a-z0-9-]+)==(\S+) \\$", text, re.MULTILINE)), text

    peer, text = pins("peer.txt")
    ours, _ = pins("cpu.txt")
    assert {"trl", "torch", "transformers", "accelerate"} <= peer.keys()
    assert {name: version for name, version in peer.items() if name in ours} == {
        name: ours[name] for name in peer if name in ours
    }
    assert len(re.findall(r"^[a-z0-9-]+==.*\\\n    --hash=sha256:", text, re.MULTILINE)) == len(peer)
