"""The trainer's log-probs on disk: what is kept of a loss, and files that are there whole or not at all."""

import threading
from types import SimpleNamespace

import datasets
import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
import torch

from exprl_megatron.algorithms.batch import TrainSample, dummy_sample, pad
from exprl_megatron.algorithms.objective import policy_objective
from exprl_megatron.config.losses import LossConfig
from exprl_megatron.errors import UserError
from exprl_megatron.runs.log_prob_files import TraceLogProbs, TrainerLogProbFiles
from exprl_megatron.training.trainer_log_probs import TrainerLogProbs


def world(dp_rank=0, dp=1, tp_rank=0, cp_rank=0, last_stage=True):
    layout = SimpleNamespace(dp=dp)
    return SimpleNamespace(layout=layout, dp_rank=dp_rank, tp_rank=tp_rank, cp_rank=cp_rank, last_stage=last_stage)


def sample(place, response, **fields):
    return TrainSample((1, 2), response, advantages=(1.0,) * len(response), place=place, **fields)


def learn(kept: TrainerLogProbs, samples, first: float) -> torch.Tensor:
    """Pass micro-batches of `samples` through a loss; the log-probs are first, first - 1, ... in row-major order."""
    micro = pad(samples, max(map(len, samples)))
    log_probs = (first - torch.arange(micro.mask.numel(), dtype=torch.float32)).view_as(micro.mask)
    objective = kept.recorded(policy_objective(LossConfig(kl_coefficient=0)))
    loss, _ = objective(log_probs.clone().requires_grad_(), torch.zeros_like(log_probs), micro)
    loss.backward()
    return log_probs


def test_each_trace_has_the_log_probs_of_its_own_tokens_without_padding(tmp_path):
    kept = TrainerLogProbs(tmp_path, world(), is_rank0=True)
    log_probs = learn(kept, [sample((1, 0), (5, 6)), sample((0, 3), (7, 8, 9))], -1.0)
    kept.write("a", 1)
    kept.wait()
    found = kept.files.read("a", 1)
    # The first token of a response is predicted at the prompt's last one.
    assert {place: values.tolist() for place, values in found.items()} == {
        (0, 3): log_probs[1, 1:4].tolist(),
        (1, 0): log_probs[0, 1:3].tolist(),
    }
    assert all(values.dtype == np.float32 for values in found.values())


def test_where_a_step_has_several_updates_the_log_probs_are_those_before_the_first(tmp_path):
    kept = TrainerLogProbs(tmp_path, world(), is_rank0=True)
    for number, old in enumerate((-0.25, -0.5)):
        learn(kept, [sample((number, 0), (5, 6), old_log_probs=(old, old), rollout_log_probs=(-9, -9))], -1.0)
    kept.write("a", 1)
    kept.wait()
    found = kept.files.read("a", 1)
    assert {place: values.tolist() for place, values in found.items()} == {(0, 0): [-0.25] * 2, (1, 0): [-0.5] * 2}


def test_a_step_has_only_what_was_kept_since_the_step_before(tmp_path):
    kept = TrainerLogProbs(tmp_path, world(), is_rank0=True)
    for step in (1, 2):
        learn(kept, [sample((step, 0), (5,))], -1.0)
        kept.write("a", step)
    kept.wait()
    assert [list(kept.files.read("a", step)) for step in (1, 2)] == [[(1, 0)], [(2, 0)]]


def test_a_rank_without_traces_of_its_own_writes_an_empty_part(tmp_path):
    kept = TrainerLogProbs(tmp_path, world(), is_rank0=True)
    learn(kept, [dummy_sample([sample((0, 0), (5,))])], -1.0)
    kept.write("a", 1)
    kept.wait()
    assert kept.files.read("a", 1) == {}


@pytest.mark.parametrize("other", [{"tp_rank": 1}, {"cp_rank": 1}, {"last_stage": False}])
def test_of_the_processes_that_have_the_same_traces_one_alone_writes(tmp_path, other):
    kept = TrainerLogProbs(tmp_path, world(**other), is_rank0=False)
    objective = policy_objective(LossConfig())
    assert kept.recorded(objective) is objective
    kept.write("a", 1)
    kept.wait()
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_step_is_there_when_every_rank_has_written_its_part_and_not_before(tmp_path):
    ranks = [TrainerLogProbs(tmp_path, world(dp_rank=rank, dp=3), is_rank0=rank == 0) for rank in range(3)]
    for rank, kept in enumerate(ranks):
        learn(kept, [sample((rank, 0), (5, 6))], -1.0 - rank)
    for kept in ranks[:2]:
        kept.write("a", 1)
    ranks[1].wait()
    assert ranks[0].files.read("a", 1) is None
    ranks[2].write("a", 1)
    ranks[0].wait()
    assert list(ranks[0].files.read("a", 1)) == [(0, 0), (1, 0), (2, 0)]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["step-000001"]


def rows(*places):
    return [TraceLogProbs(*place, np.float32([-0.5, -1.5])) for place in places]


def test_what_an_interrupted_run_left_unfinished_is_not_taken_for_a_part_of_the_next_one(tmp_path):
    files = TrainerLogProbFiles(tmp_path)
    files.write_part("a", 1, (1, 2), rows((9, 9)))
    kept = TrainerLogProbs(tmp_path, world(dp=2), is_rank0=True)
    assert not list(tmp_path.rglob("*.parquet"))
    kept.write("a", 1)
    files.write_part("a", 1, (1, 2), rows((1, 0)))
    kept.wait()
    assert list(files.read("a", 1)) == [(1, 0)]


def test_a_step_that_is_learned_again_replaces_the_files_of_another_layout(tmp_path):
    files = TrainerLogProbFiles(tmp_path)
    for part in ((0, 2), (1, 2)):
        files.write_part("a", 1, part, rows((part[0], 0)))
    files.publish("a", 1, 2, 1.0)
    files.write_part("a", 1, (0, 1), rows((0, 0), (1, 0)))
    files.publish("a", 1, 1, 1.0)
    assert [path.name for path in files.directory("a", 1).iterdir()] == ["part-00000-of-00001.parquet"]


def test_a_part_that_never_comes_is_named_with_the_remedy(tmp_path):
    files = TrainerLogProbFiles(tmp_path)
    files.write_part("a", 7, (0, 2), rows((0, 0)))
    with pytest.raises(UserError, match=r"Only 1 of 2 ranks .* step 7 of a .* set journal.trainer_log_probs to false"):
        files.publish("a", 7, 2, 0.0)


def test_a_write_that_failed_is_raised_by_the_next_call(tmp_path):
    (tmp_path / "a").write_text("a file where a directory is wanted")
    kept = TrainerLogProbs(tmp_path, world(), is_rank0=True)
    kept.write("a", 1)
    with pytest.raises(OSError, match="a"):
        kept.wait()


def test_writing_does_not_hold_up_the_step(tmp_path, monkeypatch):
    go_on, written = threading.Event(), TrainerLogProbFiles.write_part
    monkeypatch.setattr(TrainerLogProbFiles, "write_part", lambda *args: (go_on.wait(60), written(*args)))
    kept = TrainerLogProbs(tmp_path, world(), is_rank0=True)
    learn(kept, [sample((0, 0), (5,))], -1.0)
    kept.write("a", 1)
    assert kept.files.read("a", 1) is None
    go_on.set()
    kept.wait()
    assert list(kept.files.read("a", 1)) == [(0, 0)]


def test_a_damaged_file_is_named(tmp_path):
    files = TrainerLogProbFiles(tmp_path)
    files.write_part("a", 1, (0, 1), rows((0, 0)))
    files.publish("a", 1, 1, 1.0)
    path = files.directory("a", 1) / "part-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"part-00000-of-00001.parquet is damaged .* delete the directory"):
        files.read("a", 1)


def test_only_the_newest_steps_are_recorded(tmp_path):
    files = TrainerLogProbFiles(tmp_path)
    for step in range(1, 6):
        files.write_part("a", step, (0, 1), rows((0, 0)))
        files.publish("a", step, 1, 1.0)
    files.keep_newest("a", 4, 2)
    assert [step for step in range(1, 6) if files.read("a", step)] == [3, 4, 5]


def test_other_programs_read_the_documented_columns_and_numbers_are_split_by_bytes(tmp_path):
    files = TrainerLogProbFiles(tmp_path)
    for part in ((0, 2), (1, 2)):
        files.write_part("a", 1, part, rows((part[0], 4)))
    files.publish("a", 1, 2, 1.0)
    frame = pandas.read_parquet(files.directory("a", 1))
    assert list(frame.columns) == ["group", "sample", "trainer_log_probs"]
    assert sorted(frame["group"]) == [0, 1] and frame["trainer_log_probs"][0].tolist() == [-0.5, -1.5]
    pattern = str(files.directory("a", 1) / "*.parquet")
    loaded = datasets.load_dataset("parquet", data_files=pattern, cache_dir=str(tmp_path / "cache"))["train"]
    assert loaded["sample"][:] == [4, 4] and loaded.features["trainer_log_probs"].feature.dtype == "float32"
    column = pq.ParquetFile(next(files.directory("a", 1).iterdir())).metadata.row_group(0).column(2)
    assert "BYTE_STREAM_SPLIT" in column.encodings and column.compression == "ZSTD"
