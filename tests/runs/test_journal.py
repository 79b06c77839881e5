import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.operations import instructions

from exprl_megatron.errors import UserError
from exprl_megatron.judging.judgement import Abstained, Scored
from exprl_megatron.rollout.group import GradedTrace, Group, JudgedSegment
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.runs import rollout_table
from exprl_megatron.runs.journal import Journal, SampledStep


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


def test_a_group_may_continue_in_the_next_row_group(tmp_path, monkeypatch):
    monkeypatch.setattr("exprl_megatron.runs.journal._ROWS", 2)
    journal, written = Journal(tmp_path), step("a", "b", "a", "c")
    journal.write("prime", 1, written)
    with pq.ParquetFile(journal.path("prime", 1)) as file:
        assert file.num_row_groups == 6
    assert journal.read("prime", 1) == written


def test_what_is_read_of_a_row_group_is_dropped_before_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr("exprl_megatron.runs.journal._ROWS", 3)
    member, held = rollout_table._member, []

    def watched(row, arrays):
        held.append(pa.total_allocated_bytes() - before)
        return member(row, arrays)

    journal = Journal(tmp_path)
    long = replace(group("a").samples[0].trace, text="x" * 2**20)
    journal.write("prime", 1, SampledStep([Group("a", (GradedTrace(long, Scored(1.0)),) * 30)], 1))
    monkeypatch.setattr(rollout_table, "_member", watched)
    before = pa.total_allocated_bytes()
    journal.read("prime", 1)
    assert len(held) == 30 and max(held) < 8 * 2**20


def test_a_step_never_sampled_reads_as_none(tmp_path):
    assert Journal(tmp_path).read("prime", 1) is None


def test_a_half_written_step_does_not_exist(tmp_path):
    journal = Journal(tmp_path)
    journal.write("prime", 1, step("a"))
    path = journal.path("prime", 1)
    path.rename(path.with_name(path.name + ".tmp"))
    assert journal.read("prime", 1) is None and not journal.has("prime", 1) and journal.steps("prime") == []


def test_a_step_that_cannot_be_written_leaves_nothing(tmp_path):
    journal = Journal(tmp_path)
    with pytest.raises(TypeError):
        journal.write("prime", 1, replace(step("a"), judge_counts={"asked": object()}))
    assert journal.read("prime", 1) is None


@pytest.mark.parametrize("where", [0.1, 0.5, 0.9])
def test_a_damaged_journal_file_is_named(tmp_path, where):
    journal = Journal(tmp_path)
    journal.write("prime", 1, step("a"))
    path = journal.path("prime", 1)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(where * len(whole))])
    with pytest.raises(UserError, match=r"step-000001\.parquet is damaged"):
        journal.read("prime", 1)


def test_a_changed_byte_of_the_numbers_is_noticed(tmp_path):
    journal = Journal(tmp_path)
    trace = replace(group("a").samples[0].trace, token_ids=range(5000), log_probs=[-0.1] * 5000)
    journal.write("prime", 1, SampledStep([Group("a", (GradedTrace(trace, Scored(1.0)),))], 1))
    path = journal.path("prime", 1)
    column = pq.ParquetFile(path).metadata.row_group(0).column(5)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + column.total_compressed_size - 10] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"step-000001\.parquet is damaged"):
        journal.read("prime", 1)


@pytest.mark.parametrize("place", ["score", "segment", "verifier", "log-prob"])
def test_a_score_that_is_none_is_a_damaged_file(tmp_path, place):
    """Such as somebody's who edited the file."""
    journal = Journal(tmp_path)
    journal.write("prime", 1, step("a"))
    path = journal.path("prime", 1)
    table = pq.read_table(path)
    rows = table.to_pylist()
    if place == "score":
        rows[0]["judgement"]["value"] = 7.0
    elif place == "segment":
        rows[2]["segments"][0]["value"] = float("nan")
    elif place == "verifier":
        rows[2]["verified"]["value"] = -0.5
    else:
        rows[1]["log_probs"][1] = float("nan")
    pq.write_table(type(table).from_pylist(rows, table.schema), path)
    with pytest.raises(UserError, match=r"step-000001\.parquet is damaged \((a score is in|log_probs has)"):
        journal.read("prime", 1)


def test_a_file_of_a_later_version_is_refused_by_its_number(tmp_path, monkeypatch):
    journal = Journal(tmp_path)
    monkeypatch.setattr("exprl_megatron.runs.journal.VERSION", 4)
    journal.write("prime", 1, step("a"))
    monkeypatch.undo()
    with pytest.raises(UserError, match="has version 4, and this program reads version 3; resume with the program"):
        journal.read("prime", 1)


def test_steps_of_the_first_version_are_still_read(tmp_path):
    shutil.copy(Path(__file__).parents[1] / "data" / "journal_v1.jsonl.gz", tmp_path)
    (tmp_path / "prime").mkdir()
    (tmp_path / "journal_v1.jsonl.gz").rename(tmp_path / "prime" / "step-000003.jsonl.gz")
    journal = Journal(tmp_path)
    journal.write("prime", 4, step("c"))
    assert journal.read("prime", 3) == step("a", "b")
    assert journal.steps("prime") == [3, 4] and journal.has("prime", 3)


@pytest.mark.parametrize(("dtype", "experts"), [(np.uint8, 256), (np.int16, 512)])
def test_the_experts_of_each_token_come_back_bit_for_bit_and_compactly(tmp_path, dtype, experts):
    journal, draw = Journal(tmp_path), np.random.default_rng(0)

    def routed(problem_id: str, tokens: int) -> GradedTrace:
        rows = draw.integers(0, experts, (tokens + 1, 12, 4)).astype(dtype)
        trace = group(problem_id).samples[0].trace
        ids, log_probs = np.arange(tokens), np.zeros(tokens)
        return GradedTrace(replace(trace, token_ids=ids, log_probs=log_probs, routed_experts=rows), Scored(1.0))

    sampled = SampledStep(
        [Group("a", (routed("a", 900), routed("a", 3))), Group("b", (routed("b", 0), *group("b").samples))], 1
    )
    journal.write("prime", 1, sampled)
    read = journal.read("prime", 1)
    assert read == sampled and read.groups[0].samples[0].trace.routed_experts.dtype == dtype
    assert read.groups[1].samples[1].trace.routed_experts is None
    assert journal.path("prime", 1).stat().st_size < 20_000 + 905 * 48 * np.dtype(dtype).itemsize
    row = pq.read_table(journal.path("prime", 1))["routed_experts"][1].as_py()
    expected = sampled.groups[0].samples[1].trace.routed_experts
    assert np.frombuffer(row.pop("ids"), dtype).reshape(4, 12, 4).tolist() == expected.tolist()
    assert row == {"layers": 12, "top_k": 4, "id_bytes": np.dtype(dtype).itemsize}


def test_a_file_of_the_version_before_is_read_without_experts(tmp_path, monkeypatch):
    journal = Journal(tmp_path)
    journal.write("prime", 1, step("a", "b"))
    path = journal.path("prime", 1)
    table = pq.read_table(path).drop_columns(["routed_experts"])
    metadata = {b"exprl": table.schema.metadata[b"exprl"].replace(b'"version": 3', b'"version": 2')}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    assert journal.read("prime", 1) == step("a", "b")


def test_a_step_is_an_ordinary_parquet_file(tmp_path):
    """As readers that know nothing of this package see it."""
    journal = Journal(tmp_path)
    scored = GradedTrace(group("a").samples[0].trace, Scored(0.5, "lone \ud800", hash="ab12"))
    journal.write("prime", 3, SampledStep([group("a"), Group("b", (scored,))], 2))
    rows = datasets.load_dataset("parquet", data_files=str(journal.path("prime", 3)), cache_dir=tmp_path / "cache")
    *first, last = rows["train"].to_list()
    assert [row["problem_id"] for row in first] == ["a"] * 3 and {row["domain"] for row in first} == {"science"}
    assert last["group"] == 1 and last["token_ids"] == [3, 4] and last["text"] == "drei\nvier"
    assert last["judgement"] == {"value": 0.5, "reason": None, "evidence": "lone \\ud800", "hash": "ab12"}
    assert last["segments"] == [] and last["verified"] is None
    assert last["weight_versions"] == [{"version": "v0", "start": 0, "end": 2}]
    judged = first[2]["segments"]
    assert [(s["start"], s["end"], s["value"], s["reason"]) for s in judged] == [
        (0, 1, 1 / 3, None),
        (1, 2, None, "unreadable"),
    ]


def test_a_step_is_written_and_read_in_memory_of_malloc_unless_the_user_selects_another(tmp_path, monkeypatch):
    pools = []
    monkeypatch.setattr(pa, "set_memory_pool", lambda pool: pools.append(pool.backend_name))
    monkeypatch.delenv("ARROW_DEFAULT_MEMORY_POOL", raising=False)
    journal = Journal(tmp_path)
    journal.write("prime", 1, step("a"))
    assert pools == ["system"]
    journal.read("prime", 1)
    assert pools == ["system"] * 2
    monkeypatch.setenv("ARROW_DEFAULT_MEMORY_POOL", "mimalloc")
    assert journal.read("prime", 1) == step("a")
    assert len(pools) == 2


def test_writing_costs_nothing_for_each_token(tmp_path):
    journal = Journal(tmp_path)

    def cost(tokens: int) -> int:
        trace = replace(group("a").samples[0].trace, token_ids=range(tokens), log_probs=[-0.1] * tokens)
        sampled = SampledStep([Group("a", (GradedTrace(trace, Scored(1.0)),) * 4)], 1)
        return instructions(lambda: journal.write("prime", 1, sampled))

    cost(10)
    assert cost(20_000) <= 1.1 * cost(20)


def test_the_newest_steps_are_kept_and_all_that_no_checkpoint_has(tmp_path):
    journal = Journal(tmp_path)
    for number in range(1, 8):
        journal.write("prime", number, step("a"))
    journal.write("sparse", 1, step("a"))
    journal.keep_newest("prime", 5, 2)
    assert journal.steps("prime") == [4, 5, 6, 7] and journal.steps("sparse") == [1]


def test_an_abstention_has_no_score():
    members = group("a").samples
    assert [member.score for member in members] == [0.75, None, None]
    assert group("a").scores == [0.75]
