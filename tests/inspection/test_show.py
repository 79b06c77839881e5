"""`exprl show` as it is typed, on files that the rollout log's own writer made."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from transformers import AutoTokenizer

from exprl_megatron.judging.judgement import Abstained, Scored
from exprl_megatron.rollout.group import GradedTrace, Group, JudgedSegment, RewardTerm
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.runs.journal import Journal, SampledStep, write_step
from exprl_megatron.runs.log_prob_files import TraceLogProbs, TrainerLogProbFiles
from exprl_megatron.utils.files import Claim

POLICY = Path(__file__).parents[2] / "recipes" / "miniature" / "policy"
V1 = Path(__file__).parents[1] / "data" / "journal_v1.jsonl.gz"
HASH = "ab" * 32
HOSTILE = "\x1b[2J[bold red]p[/bold red]\x9b31m\r\u202e"


def member(sample: int, judgement, tokens: int = 4, text: str = "words", **fields) -> GradedTrace:
    versions = fields.pop("versions", (("v0", 0, tokens),))
    finish = fields.pop("finish", "stop")
    trace = Trace("p", sample, (1,), range(tokens), (-0.5,) * tokens, text, finish, versions)
    return GradedTrace(trace, judgement, **fields)


def group(problem: str, *judgements, **fields) -> Group:
    return named(problem, *(member(sample, judgement, **fields) for sample, judgement in enumerate(judgements)))


def named(problem: str, *members: GradedTrace) -> Group:
    """The group of these traces, which are of `problem`."""
    return Group(problem, tuple(replace(each, trace=replace(each.trace, problem_id=problem)) for each in members))


@pytest.fixture
def run(tmp_path):
    """A run with an outcome and a process stage, without a step."""
    shared = {"steps": 9, "problems": {"source": "x.jsonl"}, "group_size": 2}
    shared["sampling"] = {"max_new_tokens": 64}
    stages = [
        shared | {"kind": "exprl-outcome", "name": "prime", "advantage": "mean-centered"},
        shared | {"kind": "exprl-process", "name": "parts", "estimator": "delta"},
    ]
    policy = {"model": str(POLICY), "max_tokens": 160}
    tree = {"directory": str(tmp_path), "policy": policy, "judge": {"model": "j"}, "stages": stages}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


@pytest.fixture
def exprl(command_line):
    return partial(command_line, "show")


def log(run: Path, stage: str, step: int, *groups: Group) -> None:
    Journal(run / "journal").write(stage, step, SampledStep(list(groups), len(groups)))


def test_traces_are_shown_with_score_verifier_advantage_end_weights_and_hash(exprl, run):
    versions = (("v3", 0, 3), ("v4", 3, 7))
    right = member(0, Scored(0.75, "fine", HASH), 7, finish="length", versions=versions, verified=Scored(1.0))
    wrong = member(1, Scored(0.25, "poor"), verified=Scored(0.0))
    log(run, "prime", 2, Group("p", (right, wrong)))
    # `overlong` is zero by default: the first trace's score counts as 0, so that the mean is 0.125.
    status, printed, _ = exprl(run)
    assert status == 0
    rows = [" ".join(line.split()) for line in printed.splitlines()]
    assert rows[0] == "prime, step 2, group 0: p (math)"
    assert "0 0.75 right -0.125 7 length v3 0-3, v4 3-7 abababababab" in rows
    assert "1 0.25 wrong +0.125 4 stop v0" in rows
    assert "2 traces, mean score 0.5, spread 0.5, mean length 6 tokens" in rows


def test_the_latest_step_of_the_latest_stage_is_shown_unless_another_is_asked_for(exprl, run):
    for stage, step in (("prime", 1), ("prime", 12), ("prime", 3)):
        log(run, stage, step, group(f"{stage}-{step}", Scored(1.0), Scored(0.0)))
    assert "prime-12" in exprl(run)[1]
    log(run, "parts", 1, named("parts-1", cut(0, 0.5, 1.0), cut(1, 0.0, 0.5)))
    assert "parts-1" in exprl(run)[1]
    assert "prime-3" in exprl(run, "--stage", "prime", "--step", 3)[1]


def test_a_problem_is_found_in_every_step(exprl, run):
    for step in (1, 2, 3):
        log(run, "prime", step, group("same", Scored(step / 4), Scored(0.0)), group("other", Scored(1.0), Scored(1.0)))
    groups = json.loads(exprl(run, "--problem", "same", "--sample", 0, "--json")[1])["groups"]
    assert [each["place"] for each in groups] == ["prime, step 1", "prime, step 2", "prime, step 3"]
    assert [[trace["judgement"]["value"] for trace in each["traces"]] for each in groups] == [[0.25], [0.5], [0.75]]


@pytest.mark.parametrize(
    ("sort", "problems", "upward", "samples"),
    [
        ("score", ["high", "wide", "hacked", "none"], ["hacked", "wide", "high", "none"], [1, 0]),
        ("spread", ["wide", "hacked", "high", "none"], ["high", "hacked", "wide", "none"], [0, 1]),
        ("length", ["hacked", "wide", "high", "none"], ["none", "high", "wide", "hacked"], [1, 0]),
        # Where a verifier was not asked, or neither has a score, there is nothing to disagree with.
        ("disagreement", ["hacked", "high", "none", "wide"], ["high", "hacked", "none", "wide"], [1, 0]),
    ],
)
def test_groups_and_their_traces_are_sorted(exprl, run, sort, problems, upward, samples):
    none = group("none", Abstained("timeout"), Abstained("refused"), tokens=1)
    wide = named("wide", member(0, Scored(0.25), 5), member(1, Scored(1.0), 6))
    high = group("high", Scored(0.75), Scored(0.75), tokens=3, verified=Scored(1.0))
    hacked = (member(0, Scored(0.0), 20, verified=Scored(0.0)), member(1, Scored(0.5), 21, verified=Scored(1.0)))
    log(run, "prime", 1, none, wide, high, named("hacked", *hacked))
    found = json.loads(exprl(run, "--sort", sort, "--json")[1])["groups"]
    assert [each["problem_id"] for each in found] == problems
    last = next(each for each in found if each["problem_id"] == "hacked")
    assert [trace["sample"] for trace in last["traces"]] == samples
    found = json.loads(exprl(run, "--sort", sort, "--ascending", "--json")[1])["groups"]
    assert [each["problem_id"] for each in found] == upward


def test_abstentions_of_all_steps_are_shown_with_their_reasons(exprl, run):
    without = group("b", Scored(1.0), Scored(1.0))
    log(run, "prime", 1, group("a", Scored(1.0), Abstained("unreadable", "what?")), without)
    log(run, "prime", 2, group("c", Scored(1.0), Scored(0.0)))
    _, printed, _ = exprl(run, "--abstained", "--text")
    assert "abstained: unreadable" in printed and "what?" in printed and "out" in printed
    assert "step 2" not in printed and ": b (" not in printed
    log(run, "parts", 1, named("d", cut(0, 0.5, None), cut(1, 0.5, 1.0)))
    found = json.loads(exprl(run, "--abstained", "--json")[1])["groups"]
    assert [(each["problem_id"], [trace["sample"] for trace in each["traces"]]) for each in found] == [
        ("a", [1]),
        ("d", [0]),
    ]


def cut(sample: int, *scores: float | None, lengths: tuple[int, ...] | None = None, **fields) -> GradedTrace:
    lengths = lengths or (2,) * len(scores)
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    judged = [Abstained("unreadable") if score is None else Scored(score, "", HASH) for score in scores]
    parts = zip(ends, lengths, judged, strict=True)
    segments = tuple(JudgedSegment(end - length, end, judgement) for end, length, judgement in parts)
    return member(sample, judged[-1], ends[-1], segments=segments, **fields)


def test_segments_have_rows_with_their_scores_and_advantages(exprl, run):
    log(run, "parts", 1, Group("p", (cut(0, 0.25, 1.0), cut(1, 0.5, 0.5))))
    rows = [" ".join(line.split()) for line in exprl(run)[1].splitlines()]
    # DeltaNorm: A_1 = s_1 - s_T, A_2 = s_2 - s_1 (arXiv 2606.17024, equations 2 and 5).
    assert ".0 0.25 -0.750 0-2 abababababab" in rows
    assert ".1 1 +0.750 2-4 abababababab" in rows


def test_the_text_is_printed_with_the_segments_boundaries(exprl, run):
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    ids = tokenizer.encode(" s1 6 + 3 = 9 s2 9 - 2 = 7", add_special_tokens=False)
    text, half = tokenizer.decode(ids), len(ids) // 2
    first, second = tokenizer.decode(ids[:half]), text[len(tokenizer.decode(ids[:half])) :]
    segments = (JudgedSegment(0, half, Scored(0.25, "weak")), JudgedSegment(half, len(ids), Scored(1.0, "strong")))
    versions = (("v0", 0, len(ids)),)
    trace = Trace("p", 0, (1,), ids, (-0.5,) * len(ids), text, "stop", versions)
    log(run, "parts", 1, Group("p", (GradedTrace(trace, Scored(1.0, "strong"), segments),)))
    lines = [line.strip("│ ") for line in exprl(run, "--text")[1].splitlines()]
    start = lines.index(f".0  tokens 0-{half}  score 0.25  advantage -0.750")
    assert lines[start + 1] == first.strip()
    assert lines[start + 2] == f".1  tokens {half}-{len(ids)}  score 1  advantage +0.750"
    assert lines[start + 3] == second.strip()
    assert "weak" in lines and "strong" in lines


def test_segments_are_marked_in_the_text_as_a_server_decodes_it_behind_a_prompt(exprl, run):
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    ids = tokenizer.encode("s1 6 + 3 = 9 s2 9 - 2 = 7", add_special_tokens=False)
    text = " " + tokenizer.decode(ids)
    traced = cut(0, 0.25, 1.0, lengths=(6, len(ids) - 6))
    member_ = replace(traced, trace=replace(traced.trace, token_ids=ids, log_probs=(-0.5,) * len(ids), text=text))
    log(run, "parts", 1, named("p", member_, cut(1, 0.5, 0.5)))
    _, printed, _ = exprl(run, "--text", "--sample", 0)
    assert "does not give this text" not in printed
    assert " s1 6 + 3 = 9 " in printed and " s2 9 - 2 = 7" in printed and "s1 6 + 3 = 9 s2" not in printed


def test_without_the_policys_tokenizer_the_text_is_printed_whole(exprl, run):
    log(run, "parts", 1, Group("p", (cut(0, 0.25, 1.0, text="not of these tokens"),)))
    _, printed, _ = exprl(run, "--text")
    assert "its segments are not marked" in " ".join(printed.split()) and "not of these tokens" in printed


@pytest.mark.parametrize("options", [[], ["--text"]])
def test_nothing_from_a_run_reaches_the_terminal_as_a_command_or_as_markup(exprl, run, options):
    hostile = {"text": HOSTILE, "finish": HOSTILE, "versions": ((HOSTILE, 0, 4),)}
    judged = Abstained(HOSTILE, HOSTILE)
    log(run, "prime", 1, group(HOSTILE, judged, Scored(0.5, HOSTILE), verified=Abstained(HOSTILE, HOSTILE), **hostile))
    status, printed, _ = exprl(run, *options)
    assert status == 0
    assert not {"\x1b", "\x9b", "\r", "\u202e"} & set(printed)
    assert "␛[2J[bold red]p[/bold red]" in printed


def test_held_out_answers_are_shown_alike(exprl, run):
    for name in ("start", "prime/step-2"):
        answers = SampledStep([group("held-out", Scored(1.0, "42"), Scored(0.0, "41"))], 1)
        write_step(run / "evaluations" / f"{name}.parquet", answers)
    _, printed, _ = exprl(run, "--evaluation", "prime/step-2", "--text")
    assert "evaluation prime/step-2, group 0: held-out (math)" in printed and "41" in printed
    status, _, said = exprl(run, "--evaluation", "sparse")
    assert status == 2 and "it has those of prime/step-2, start." in said and said.count("\n") == 1


def test_a_run_that_is_in_progress_is_shown_up_to_its_last_whole_step(exprl, run):
    log(run, "prime", 1, group("whole", Scored(1.0), Scored(0.0)))
    path = Journal(run / "journal").path("prime", 2)
    path.with_name(path.name + ".tmp").write_bytes(b"PAR1half")
    claim = Claim(run)
    status, printed, _ = exprl(run)
    claim.release()
    assert status == 0 and "whole" in printed


def test_steps_in_the_first_format_are_shown(exprl, run):
    (run / "journal" / "prime").mkdir(parents=True)
    shutil.copy(V1, run / "journal" / "prime" / "step-000001.jsonl.gz")
    status, printed, _ = exprl(run)
    assert status == 0 and "prime, step 1, group 0" in printed


def test_limited_groups_say_how_many_there_are(exprl, run):
    log(run, "prime", 1, *(group(f"p{i}", Scored(1.0), Scored(0.0)) for i in range(3)))
    printed = exprl(run, "--limit", 2)[1]
    assert "2 of 3 groups" in printed and "p1" in printed and "p2" not in printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--stage", "prim"], "has no stage 'prim'; its stages are prime, parts."),
        (["--stage", "parts"], "has no step of stage parts yet"),
        (["--step", "7"], "has no step 7; it has 1 to 2 of stage prime."),
        (["--problem", "q"], "No trace of prime, step 1 to prime, step 2 meets the conditions"),
        (["--step", "1", "--evaluation", "start"], "leave out --stage and --step"),
        (["--step", "2"], "step-000002.parquet is damaged"),
    ],
)
def test_what_cannot_be_shown_is_one_sentence(exprl, run, arguments, sentence):
    log(run, "prime", 1, group("p", Scored(1.0), Scored(0.0)))
    path = Journal(run / "journal").path("prime", 2)
    log(run, "prime", 2, group("p", Scored(1.0), Scored(0.0)))
    if arguments == ["--step", "2"]:
        path.write_bytes(path.read_bytes()[:300])
    status, _, said = exprl(run, *arguments)
    assert (status, said.count("\n")) == (2, 1)
    assert sentence in said


def test_a_directory_without_a_run_is_one_sentence(exprl, tmp_path):
    status, _, said = exprl(tmp_path / "nowhere")
    assert (status, said.count("\n")) == (2, 1) and "There is no run in" in said


def test_a_log_that_does_not_fit_the_stage_is_one_sentence(exprl, run):
    log(run, "parts", 1, group("p", Scored(1.0), Scored(0.0)))
    status, _, said = exprl(run)
    assert (status, said.count("\n")) == (2, 1) and "does not fit stage parts" in said


def test_the_terms_of_a_mixed_reward_are_shown(run, exprl):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["stages"][0]["reward"] = [{"term": "judge"}, {"term": "mine:fmt", "weight": 0.2}]
    config["stages"][0]["advantage"] = "mine_that_is_not_here:f"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    terms = [
        (RewardTerm("judge", "judge", 1.0, 0.5), RewardTerm("fmt", "mine:fmt", 0.2, value, evidence))
        for value, evidence in ((1.0, ""), (None, "verifier-error: line 3"))
    ]
    log(run, "prime", 1, Group("p", tuple(member(k, Scored(0.5), terms=t) for k, t in enumerate(terms))))
    code, out, _ = exprl(str(run), "--stage", "prime", "--text")
    assert code == 0
    assert "reward: 0.7" in out and "0.2 x fmt 1" in out
    assert "reward: none" in out and "fmt abstained (verifier-error: line 3)" in " ".join(out.split())
    traces = json.loads(exprl(str(run), "--json")[1])["groups"][0]["traces"]
    assert [trace["reward"] for trace in traces] == [0.7, None]
    assert traces[0]["terms"][1]["name"] == "fmt"


def keep_trainer(run: Path, stage: str, step: int, *rows: tuple[int, int, list[float]]) -> None:
    files = TrainerLogProbFiles(run / "trainer_log_probs")
    files.write_part(stage, step, (0, 1), [TraceLogProbs(g, s, np.float32(values)) for g, s, values in rows])
    files.publish(stage, step, 1, 1.0)


def test_tokens_show_how_far_trainer_and_sampler_are_from_each_other(exprl, run):
    log(run, "prime", 1, group("p", Scored(0.5), Scored(0.75)))
    # The sampler's log-probs are -0.5 each.
    keep_trainer(run, "prime", 1, (0, 1, [-0.5, -0.75, -0.5, -0.375]))
    status, printed, _ = exprl(run, "--tokens")
    rows = [" ".join(line.split()) for line in printed.splitlines()]
    assert status == 0
    assert any(row.startswith("1 ") and row.endswith("-0.50000 -0.75000 -2.50e-01") for row in rows)
    assert any(row.startswith("3 ") and row.endswith("-0.50000 -0.37500 +1.25e-01") for row in rows)
    assert "4 of 4 tokens, mean 9.38e-02, max 2.50e-01" in rows
    assert "The trainer's are not known: the trace is out of the loss or empty." in rows
    _, printed, _ = exprl(run, "--tokens", "--json")
    first, second = json.loads(printed)["groups"][0]["traces"]
    assert first["log_prob_gap"] is first["trainer_log_probs"] is None
    assert second["log_prob_gap"] == {"mean": 0.09375, "max": 0.25}
    assert (second["token_ids"], second["trainer_log_probs"]) == ([0, 1, 2, 3], [-0.5, -0.75, -0.5, -0.375])


def test_traces_and_groups_are_ordered_by_the_gap(exprl, run):
    log(run, "prime", 1, *(group(name, Scored(0.5), Scored(0.75)) for name in "abc"))
    near, far = [-0.5] * 4, [-0.5, -0.5, -0.5, -1.5]
    keep_trainer(run, "prime", 1, (0, 0, near), (0, 1, near), (1, 0, near), (1, 1, far))
    _, printed, _ = exprl(run, "--sort", "gap", "--json")
    found = [(each["problem_id"], [t["sample"] for t in each["traces"]]) for each in json.loads(printed)["groups"]]
    assert found == [("b", [1, 0]), ("a", [0, 1]), ("c", [0, 1])]


def test_log_probs_of_a_step_that_has_been_sampled_again_are_not_taken_for_its_own(exprl, run):
    log(run, "prime", 1, group("p", Scored(0.5)))
    keep_trainer(run, "prime", 1, (0, 0, [-0.5, -0.5]))
    status, _, error = exprl(run, "--tokens")
    assert status == 2 and "set journal.trainer_log_probs to true" in error


def test_a_run_that_keeps_no_trainer_log_probs_says_how_to_get_them(exprl, run):
    log(run, "prime", 1, group("p", Scored(0.5)))
    status, _, error = exprl(run, "--tokens")
    assert status == 2
    assert "The trainer's log-probs of prime, step 1 are not on disk" in error
