"""A run on real servers behind a router and proxies, to which everything happens once that can happen to it."""

import re

import pytest
from benchmarks.chaos import FaultedRun
from helpers.runs import run_config, write_problems

pytestmark = [pytest.mark.slow, pytest.mark.chaos]
DEADLINE_S = 900
STEPS = 80
KILLED = ("the trainer is killed", "the trainer is killed in a weight update", "the newest checkpoint is damaged")
STOPPED = "a rank is stopped"


@pytest.fixture(scope="module", params=["broadcast", "direct"])
def run(request, tiny_model, tmp_path_factory):
    """One step after each fault, and then to the end; what became of each fault, by its kind."""
    root = tmp_path_factory.mktemp("dying")
    problems = write_problems(root / "problems.jsonl")
    server = {"max_total_tokens": 16384, "request_deadline_s": 20, "answer_deadline_s": 10, "restarts": 10}
    whole = run_config(
        root / "run",
        tiny_model("qwen3"),
        tiny_model("qwen3", seed=1, tied=True),
        problems,
        server=server | {"count": 2, "router": True},
    )
    prime = whole.stages[0].model_copy(update={"steps": STEPS})
    judge = whole.judge.model_copy(update={"server": whole.server.model_copy(update={"count": 1})})
    sync = whole.sync.model_copy(update={"transport": request.param})
    config = whole.model_copy(update={"stages": (prime,), "judge": judge, "sync": sync})
    with FaultedRun(config, longest_s=6.0) as faulted:
        faulted.until(lambda: faulted.learned() >= 1, DEADLINE_S)
        faulted.outcomes = {kind: faulted.throw(kind, DEADLINE_S) for kind in faulted.kinds}
        faulted.until(lambda: False, DEADLINE_S)
        yield faulted


def test_no_trace_is_lost_counted_twice_of_wrong_weights_or_of_no_server_and_nobody_without_a_key_is_let_in(run):
    assert run.learned() == STEPS
    assert run.wrong() == []


def test_all_kinds_were_thrown(run):
    assert run.garbage.total() >= 2
    (aside,) = [path for path in run.paths.checkpoints.iterdir() if "damaged" in path.name]
    assert aside.name == next(sentence.partition("/")[0] for sentence in run.damaged) + ".damaged"


def test_whatever_befalls_servers_the_run_continues(run):
    assert {kind: o.ended for kind, o in run.outcomes.items() if kind not in (*KILLED, STOPPED) and o.ended} == {}


def test_what_befalls_the_trainer_stops_the_run_with_its_cause_and_it_is_resumed_on_the_same_servers(run):
    ends = [run.outcomes[kind].ended for kind in KILLED]
    assert [len(ended) for ended in ends] == [1] * len(KILLED)
    assert all(re.search(r"killed by signal 9 \(SIGKILL\).*; continue with --resume", ended[0]) for ended in ends)


def test_a_rank_that_was_stopped_is_named(run):
    (end,) = run.outcomes[STOPPED].ended
    assert "has sent no heartbeat for 45 s, its state is stopped" in end


def test_servers_that_were_killed_are_restarted(run):
    starts = run.registry.starts
    assert starts["judge-0"] == starts["router-0"] == starts["router-1"] == 2
    assert starts["policy-0"] + starts["policy-1"] >= 4
