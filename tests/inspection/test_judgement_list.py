"""`exprl judgement` with conditions, as it is typed, on files that the rollout log's own writer made."""

import json
from functools import partial

import pytest
import yaml

from exprl_megatron.judging.judgement import Abstained, Scored
from exprl_megatron.judging.store import JudgementStore
from exprl_megatron.rollout.group import GradedTrace, Group, JudgedSegment
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.runs.journal import Journal, SampledStep

HASH = "ab" * 32


def member(sample: int, judgement, version: str, segments=(), problem: str = "p") -> GradedTrace:
    trace = Trace(problem, sample, (1,), (2, 3), (-0.5, -0.5), "t", "stop", ((version, 0, 2),))
    return GradedTrace(trace, judgement, segments)


@pytest.fixture
def run(tmp_path):
    shared = {"steps": 9, "problems": {"source": "x.jsonl"}, "sampling": {"max_new_tokens": 64}}
    kinds = (("exprl-outcome", "prime"), ("exprl-process", "parts"), ("sparse-rl", "sparse"))
    stages = [shared | {"kind": kind, "name": name} for kind, name in kinds]
    tree = {"directory": str(tmp_path), "policy": {"model": "m", "max_tokens": 160}, "judge": {"model": "j"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree | {"stages": stages}))
    segments = (JudgedSegment(0, 1, Scored(0.5)), JudgedSegment(1, 2, Abstained("unreadable", "", HASH)))
    log = {
        ("prime", 1): [member(0, Scored(0.25), "v0"), member(1, Abstained("timeout"), "v0")],
        ("prime", 2): [member(0, Scored(1 / 3, "", HASH), "v1", problem="[b]\x1b[2J"), member(1, Scored(1.0), "v1")],
        ("parts", 1): [member(0, Abstained("unreadable"), "v2", segments)],
        # The answer verifier's, which is no judge.
        ("sparse", 1): [member(0, Abstained("verifier-timeout"), "v3"), member(1, Scored(1.0), "v3")],
    }
    for (stage, step), members in log.items():
        group = Group(members[0].trace.problem_id, tuple(members))
        Journal(tmp_path / "journal").write(stage, step, SampledStep([group], 1))
    return tmp_path


@pytest.fixture
def exprl(command_line):
    return partial(command_line, "judgement")


@pytest.mark.parametrize(
    ("conditions", "places"),
    [
        (["--abstained"], [("parts", 1, 0, 1), ("prime", 1, 1, None)]),
        (
            ["--stage", "prime"],
            [("prime", 2, 0, None), ("prime", 2, 1, None), ("prime", 1, 0, None), ("prime", 1, 1, None)],
        ),
        (["--stage", "prime", "--step", 1], [("prime", 1, 0, None), ("prime", 1, 1, None)]),
        (["--stage", "prime", "--limit", 1], [("prime", 2, 0, None)]),
        (["--problem", "p", "--score", "0.25"], [("prime", 1, 0, None)]),
        (["--score", "0.333"], [("prime", 2, 0, None)]),
        (["--score", "0.3:0.6"], [("parts", 1, 0, 0), ("prime", 2, 0, None)]),
    ],
)
def test_the_judges_verdicts_are_found_by_conditions(exprl, run, conditions, places):
    found = json.loads(exprl("--run", run, *conditions, "--json")[1])["judgements"]
    assert [(each["stage"], each["step"], each["sample"], each["segment"]) for each in found] == places


def test_the_list_has_the_policys_weights_and_no_commands_to_the_terminal(exprl, run):
    _, printed, _ = exprl("--run", run, "--step", 2)
    assert "v1" in printed and "abababababab" in printed and "[b]␛[2J" in printed and "\x1b" not in printed
    rows = [line.replace("│", " ").split() for line in exprl("--run", run, "--abstained")[1].splitlines()]
    assert ["abababababab", "parts", "1", "v2", "p", "0.1", "abstained:", "unreadable"] in rows


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--score", "high", "--run", "RUN"], "--score is 'high'; give a score such as 0.5"),
        (["--abstained", "--store", "f.sqlite"], "give --run DIR, and no hash and no --store"),
        (["abcdef", "--step", "1", "--run", "RUN"], "give --run DIR, and no hash and no --store"),
        (["--problem", "q", "--run", "RUN"], "meets all conditions"),
    ],
)
def test_what_cannot_be_listed_is_one_sentence(exprl, run, arguments, sentence):
    status, _, said = exprl(*(run if argument == "RUN" else argument for argument in arguments))
    assert (status, said.count("\n")) == (2, 1)
    assert sentence in said


def test_a_judgement_s_entry_names_the_traces_that_it_scored_with_stage_and_step(exprl, run):
    with JudgementStore(run / "judgements.sqlite") as store:
        store.add_judgement(HASH, {"problem": "p"}, "Score: 2", Scored(0.25, "Score: 2"))
    _, printed, _ = exprl(HASH[:12], "--run", run)
    assert "parts, step 1: p, sample 0.1, weights v2" in printed
    assert "prime, step 2: [b]␛[2J, sample 0, weights v1" in printed
    scored = json.loads(exprl(HASH[:12], "--run", run, "--json")[1])["scored"]
    assert [(place["stage"], place["step"], place["segment"]) for place in scored] == [
        ("parts", 1, 1),
        ("prime", 2, None),
    ]
    assert len(json.loads(exprl(HASH, "--run", run, "--limit", 1, "--json")[1])["scored"]) == 1
