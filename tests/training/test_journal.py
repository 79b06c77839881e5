import pytest

from exprl_megatron.errors import UserError
from exprl_megatron.judging.judgement import Abstained, Scored
from exprl_megatron.rollout.group import GradedTrace, Group, JudgedSegment
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.training.journal import Journal, SampledStep


def group(problem_id: str) -> Group:
    trace = Trace(problem_id, 0, (1, 2), (3, 4), (-0.1, -1e-17 / 3), "drei\nvier", "stop", (("v0", 0, 2),))
    segments = (JudgedSegment(0, 1, Scored(1 / 3)), JudgedSegment(1, 2, Abstained("unreadable", "?")))
    members = (
        GradedTrace(trace, Scored(0.75, "Score: 4")),
        GradedTrace(trace, Abstained("timeout")),
        GradedTrace(trace, Abstained("unreadable", "?"), segments, Scored(1.0)),
    )
    return Group(problem_id, members, "science")


def step(*problem_ids: str) -> SampledStep:
    return SampledStep([group(problem_id) for problem_id in problem_ids], len(problem_ids) + 1)


def test_a_step_comes_back_bit_for_bit(tmp_path):
    journal = Journal(tmp_path)
    journal.write("prime", 3, step("a", "b"))
    assert journal.read("prime", 3) == step("a", "b")
    assert journal.steps("prime") == [3]


def test_a_step_never_sampled_reads_as_none(tmp_path):
    assert Journal(tmp_path).read("prime", 1) is None


def test_a_half_written_step_does_not_exist(tmp_path):
    journal = Journal(tmp_path)
    journal.write("prime", 1, step("a"))
    path = journal.path("prime", 1)
    path.rename(path.with_name(path.name + ".tmp"))
    assert journal.read("prime", 1) is None


def test_a_truncated_journal_file_is_named(tmp_path):
    journal = Journal(tmp_path)
    journal.write("prime", 1, step("a"))
    path = journal.path("prime", 1)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=r"step-000001\.jsonl\.gz is damaged"):
        journal.read("prime", 1)


def test_an_abstention_has_no_score():
    members = group("a").members
    assert [member.score for member in members] == [0.75, None, None]
    assert group("a").scores == [0.75]
