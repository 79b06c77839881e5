"""Log-probs leave the micro-batches as one array for each sample: those of its response, in the order of the batch."""

from types import SimpleNamespace

import pytest
import torch

from exprl_megatron.algorithms.batch import TrainSample
from exprl_megatron.policy import step
from exprl_megatron.policy.step import share_log_probs

SAMPLES = [TrainSample((1,) * 3, (2,) * 2), TrainSample((1,), (2,) * 4), TrainSample((1, 1), (2,))]
PLAN = [[[2, 0]], [[1], []]]
"""Of two data-parallel ranks: micro-batches of places in the batch; the last one has nothing to do."""


def world(dp_rank, last_stage=True, tp_rank=0, cp_rank=0):
    device = torch.device("cpu")
    return SimpleNamespace(dp_rank=dp_rank, last_stage=last_stage, tp_rank=tp_rank, cp_rank=cp_rank, device=device)


def numbered(rows, length):
    """Log-probs whose value says their row and, in hundredths, which token they predict."""
    return torch.arange(rows)[:, None] + (torch.arange(length)[None, :] + 1) / 100


def shared(monkeypatch, *worlds):
    """What all ranks get where the sum over ranks is taken by hand."""
    flat = []
    monkeypatch.setattr(step.dist, "all_reduce", flat.append)
    for of_rank in worlds:
        batches = PLAN[of_rank.dp_rank]
        collected = [numbered(max(len(indices), 1), 6) for indices in batches]
        share_log_probs(SAMPLES, PLAN, collected, of_rank)
    total = torch.stack(flat).sum(dim=0)
    monkeypatch.setattr(step.dist, "all_reduce", lambda values: values.copy_(total))
    of_none = world(0, last_stage=False)
    return [values.tolist() for values in share_log_probs(SAMPLES, PLAN, [], of_none)]


def test_each_sample_has_the_log_probs_of_its_response_tokens_whichever_rank_computed_them(monkeypatch):
    # The token at place n of a sample (counted from 0) is predicted one place earlier, so it is number n here.
    found = shared(monkeypatch, world(0), world(1))
    assert found == [
        pytest.approx([1.03, 1.04]),
        pytest.approx([0.01, 0.02, 0.03, 0.04]),
        pytest.approx([0.02]),
    ]


@pytest.mark.parametrize("silent", [{"last_stage": False}, {"tp_rank": 1}, {"cp_rank": 1}])
def test_one_rank_of_those_that_hold_the_same_log_probs_gives_them(monkeypatch, silent):
    alone = shared(monkeypatch, world(0), world(1))
    assert shared(monkeypatch, world(0), world(0, **silent), world(1), world(1, **silent)) == alone


def test_no_array_keeps_the_memory_of_the_others(monkeypatch):
    monkeypatch.setattr(step.dist, "all_reduce", lambda values: None)
    found = share_log_probs(SAMPLES, PLAN, [], world(0, last_stage=False))
    assert all(values.base is None for values in found)
