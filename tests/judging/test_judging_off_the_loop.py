"""Where the work of judging is done: in other threads than the event loop's."""

import asyncio
import threading
from collections import Counter

import numpy as np
import pytest
from helpers.judge_parts import PROBLEM, Scripted
from helpers.tokenizer_rules import TEXT, tokenizer_of

from exprl_megatron.config.judging import JudgeConfig
from exprl_megatron.config.load import check_config
from exprl_megatron.judging import asking, cases, judge_tokenizer, store, store_connection, store_texts
from exprl_megatron.judging.judge import Judge
from exprl_megatron.judging.judgement import Scored
from exprl_megatron.rollout.group import GradedTrace
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.training import grading

WORK = [
    (grading, "segments_and_texts"),
    (cases.CaseBuilder, "build"),
    (judge_tokenizer.JudgeTokenizer, "_encoded"),
    (judge_tokenizer.JudgeTokenizer, "_rendered"),
    (store.JudgementStore, "find_judgements"),
    (store_connection.StoreConnection, "add_judgement"),
    (store_texts.StoredTexts, "compress"),
    (asking, "_parse"),
]


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of all that takes long by name, and those on the main thread apart."""
    counts: Counter = Counter()

    def watched(name, work):
        def call(*arguments, **options):
            here = threading.current_thread() is threading.main_thread()
            counts["main thread" if here else name] += 1
            return work(*arguments, **options)

        return call

    for owner, name in WORK:
        monkeypatch.setattr(owner, name, watched(name, getattr(owner, name)))
    return counts


def process_stage():
    stage = {"kind": "exprl-process", "name": "a", "steps": 3, "problems": {"source": "x"}}
    tree = {"directory": "d", "policy": {"model": "m"}, "judge": {"model": "j"}, "stages": [stage]}
    return check_config(tree, "test").stages[0]


async def right(problem, trace):
    return GradedTrace(trace, Scored(1.0))


def test_nothing_that_takes_long_is_done_on_the_event_loop_and_each_but_once(calls, tmp_path, monkeypatch):
    monkeypatch.setattr("exprl_megatron.judging.judge.model_identity", lambda model: "j")
    tokenizer = tokenizer_of("qwen")
    ids = tokenizer((TEXT + "\n\n### Next step\n") * 8, add_special_tokens=False)["input_ids"]
    trace = Trace("p1", 0, (1,), np.array(ids, np.int32), np.zeros(len(ids), np.float32), "", "stop", ())
    client = Scripted(*[""], *["Reasoning: fine.\n\nScore: 4"] * 40)
    with store.JudgementStore(tmp_path / "s.sqlite") as kept:
        judge = Judge(JudgeConfig(model="j"), [client], tokenizer, 100_000, kept)
        calls.clear()
        graded = asyncio.run(grading.grade_of(process_stage(), judge, right, tokenizer)(PROBLEM, trace))
    prefixes = len(graded.segments)
    assert prefixes >= 8 and graded.score == 0.75
    assert calls.pop("main thread", 0) == 0
    assert calls["add_judgement"] == prefixes and calls["_parse"] == prefixes + 1
    # The shared text needs two renderings and a call, once for the problem; the trace two calls.
    assert {name: calls[name] for name in ("segments_and_texts", "build", "find_judgements")} == {
        "segments_and_texts": 1,
        "build": 1,
        "find_judgements": 1,
    }
    assert calls["_encoded"] == 3 and calls["_rendered"] == prefixes + 2
    assert calls["compress"] == prefixes + 2
