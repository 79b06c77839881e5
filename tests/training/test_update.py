"""An update divides by what the loss counts: the gradients are rescaled where rejected tokens leave the denominator."""

from types import SimpleNamespace

import pytest

from exprl_megatron.algorithms.batch import TrainSample
from exprl_megatron.config.stages import SparseRlStage
from exprl_megatron.training.loop import update

SEQUENCES = [TrainSample((1,), (2, 3, 4, 5), (1.0,) * 4), TrainSample((1,), (2, 3), (1.0,) * 2)]


@pytest.mark.parametrize(
    ("aggregation", "kept", "divisor"),
    [
        ("token-mean", {}, 6),
        ("token-mean", {"accepted/tokens": 4.0, "accepted/sequences": 1.0}, 4),
        ("sequence-mean", {"accepted/tokens": 4.0, "accepted/sequences": 1.0}, 1),
        ("constant-length", {"accepted/tokens": 4.0, "accepted/sequences": 1.0}, 8),
        ("token-mean", {"accepted/tokens": 0.0, "accepted/sequences": 0.0}, 6),
    ],
)
def test_the_sum_of_the_losses_is_divided_by_what_is_kept(aggregation, kept, divisor):
    stage = SparseRlStage(
        name="s",
        kind="sparse-rl",
        steps=1,
        problems={"source": "x"},
        sampling={"max_new_tokens": 8},
        loss={"aggregation": aggregation},
    )
    divided = []

    def accumulate(sequences, objective, temperature, denominator):
        divided.append(1 / denominator)
        return {"loss": 3.0, "rejected": 3.0} | kept

    def apply_update(gradient_scale):
        divided.append(gradient_scale)
        return {}

    run = SimpleNamespace(
        policy=SimpleNamespace(accumulate=accumulate),
        recorded=lambda objective: objective,
        check_update=lambda stage, metrics: None,
        apply_update=apply_update,
    )
    metrics = update(run, stage, SEQUENCES)
    assert divided[0] * divided[1] == pytest.approx(1 / divisor)
    assert metrics == {"loss": 3 / divisor, "rejected": 0.5, "tokens": 6} | kept
