"""Each aggregation is its formula, whatever the micro-batches; the one of the released code is that of its own."""

import math
import random
from statistics import fmean
from typing import get_args

import pytest
import torch

from exprl_megatron.algorithms.aggregation import denominator_of, token_weights
from exprl_megatron.algorithms.batch import TrainSample, dummy_sample, pad
from exprl_megatron.algorithms.objective import distillation_objective, policy_objective
from exprl_megatron.config.losses import Aggregation, LossConfig
from exprl_megatron.training.statistics import update_statistics

MAX_NEW_TOKENS = 16
LENGTHS = (1, 7, 3, 5, 2, 7)
PACKINGS = {
    "all at once": [[0, 1, 2, 3, 4, 5]],
    "one by one": [[0], [1], [2], [3], [4], [5]],
    "pairs": [[4, 1], [3, 0], [2, 5]],
    "with fillers": [[1, 5], [], [0, 4, 2], [3], []],
}
INVARIANT = [name for name in get_args(Aggregation) if name != "micro-batch-mean"]
SURROGATES = {
    "clip": LossConfig(entropy_coefficient=0.01),
    "sequence-clip": LossConfig(surrogate="sequence-clip", dual_clip=None, clip_low=0.05, clip_high=0.05),
    "clipped-weight": LossConfig(surrogate="clipped-weight", dual_clip=None),
}


def _update() -> tuple[list[TrainSample], list[torch.Tensor]]:
    """Sequences, and log-probs of their response tokens as leaves."""
    draw = random.Random(4)
    sequences, log_probs = [], []
    for length in LENGTHS:
        numbers = [tuple(draw.gauss(-1.5, 0.4) for _ in range(length)) for _ in range(2)]
        advantages = tuple(draw.gauss(0, 1) for _ in range(length))
        response = tuple(range(5, 5 + length))
        prompt = (1,) * draw.randint(1, 4)
        sequences.append(TrainSample(prompt, response, advantages, None, numbers[0], numbers[1]))
        log_probs.append(torch.tensor([draw.gauss(-1.5, 0.4) for _ in range(length)], requires_grad=True))
    return sequences, log_probs


def _minimised(objective, aggregation: str, packing: list[list[int]]):
    """(loss, gradients by sequence, metric sums) as the policy accumulates them over micro-batches."""
    sequences, leaves = _update()
    divisor = denominator_of(aggregation, sequences, MAX_NEW_TOKENS)
    losses, sums = [], {}
    for indices in packing:
        rows = [sequences[index] for index in indices] or [dummy_sample(sequences)]
        micro = pad(rows, max(map(len, rows)) + 1)
        log_probs = torch.zeros(micro.mask.shape)
        if indices:
            log_probs = log_probs.masked_scatter(micro.mask > 0, torch.cat([leaves[index] for index in indices]))
        loss, metrics = objective(log_probs, log_probs.square() * micro.mask, micro)
        losses.append(loss / divisor)
        sums = {name: sums.get(name, 0.0) + value.item() for name, value in metrics.items()}
    total = sum(losses)
    total.backward()
    return total.item(), [leaf.grad for leaf in leaves], sums


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("aggregation", INVARIANT)
def test_loss_and_gradient_do_not_depend_on_micro_batches(aggregation, surrogate, packing):
    objective = policy_objective(SURROGATES[surrogate].model_copy(update={"aggregation": aggregation}))
    loss, gradients, _ = _minimised(objective, aggregation, PACKINGS["all at once"])
    found, found_gradients, _ = _minimised(objective, aggregation, PACKINGS[packing])
    assert found == pytest.approx(loss, rel=1e-5)
    assert any(gradient.abs().sum() > 0 for gradient in gradients)
    for ours, theirs in zip(found_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_released_codes_aggregation_depends_on_micro_batches_and_is_its_formula():
    objective = distillation_objective("micro-batch-mean")
    found = {}
    for name, packing in PACKINGS.items():
        losses = _token_losses()
        means = [(len(part), fmean(value for index in part for value in losses[index])) for part in packing if part]
        expected = sum(count * mean for count, mean in means) / len(LENGTHS)
        found[name], _, _ = _minimised(objective, "micro-batch-mean", packing)
        assert found[name] == pytest.approx(expected, rel=1e-5)
    assert abs(found["pairs"] - found["all at once"]) > 1e-3
    assert abs(found["pairs"] - found["one by one"]) > 1e-3


def _token_losses() -> list[list[float]]:
    """Self-distillation's loss of every token, in plain numbers."""
    sequences, leaves = _update()
    pairs = zip(leaves, sequences, strict=True)
    return [
        [(p - q) * p for p, q in zip(leaf.tolist(), sequence.ref_log_probs, strict=True)] for leaf, sequence in pairs
    ]


@pytest.mark.parametrize(
    ("aggregation", "formula"),
    [
        ("token-mean", lambda rows: fmean(value for row in rows for value in row)),
        ("sequence-mean", lambda rows: fmean(fmean(row) for row in rows)),
        ("sequence-sum", lambda rows: fmean(math.fsum(row) for row in rows)),
        ("constant-length", lambda rows: fmean(math.fsum(row) / MAX_NEW_TOKENS for row in rows)),
    ],
)
def test_an_aggregation_is_its_formula(aggregation, formula):
    loss, _, _ = _minimised(distillation_objective(aggregation), aggregation, PACKINGS["pairs"])
    assert loss == pytest.approx(formula(_token_losses()), rel=1e-5)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        # The released first stage's token losses, aggregated by verl's function.
        ("token-mean", 0.7525271666666667),
        ("sequence-sum", 2.2575815),
        ("sequence-mean", 0.5518953736827615),
        ("constant-length", 0.14109884375),
    ],
)
def test_aggregations_reproduce_the_numbers_of_verl(aggregation, expected):
    losses = torch.tensor([[-1.28, -0.904837, 0.8, 6.0], [-0.5, 0.4, 9.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0]])
    sequences = [TrainSample((1,), (2,) * 4), TrainSample((1,), (2,) * 2)]
    found = (losses * token_weights(mask, aggregation)).sum() / denominator_of(aggregation, sequences, MAX_NEW_TOKENS)
    assert found.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("aggregation", get_args(Aggregation))
def test_the_logged_loss_is_the_one_that_is_minimized(aggregation):
    config = LossConfig(aggregation=aggregation, kl_coefficient=0.0)
    loss, _, sums = _minimised(policy_objective(config), aggregation, PACKINGS["pairs"])
    tokens = sum(LENGTHS)
    logged = update_statistics(sums, tokens, denominator_of(aggregation, _update()[0], MAX_NEW_TOKENS))
    assert logged["loss"] == pytest.approx(loss, rel=1e-5)
    assert logged["loss/policy"] == pytest.approx(loss, rel=1e-5)
    assert logged["ratio"] == pytest.approx(sums["ratio"] / tokens)


def test_a_sequence_without_response_counts_for_nothing():
    rows = [TrainSample((1,), (2, 3, 4)), TrainSample((1, 2), ())]
    expected = {"token-mean": 3, "constant-length": 16}
    for aggregation in get_args(Aggregation):
        assert denominator_of(aggregation, rows, MAX_NEW_TOKENS) == expected.get(aggregation, 1)
    with pytest.raises(ValueError, match="no response token"):
        denominator_of("token-mean", rows[1:], MAX_NEW_TOKENS)
