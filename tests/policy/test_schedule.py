import math

import pytest
import torch
from transformers import optimization

from exprl_megatron.config.policy import OptimizerConfig
from exprl_megatron.policy.schedule import learning_rate


def rates(total: int, **settings) -> list[float]:
    config = OptimizerConfig(lr=2.0, **settings)
    return [learning_rate(config, step, total) for step in range(total)]


def test_constant_after_a_linear_warmup():
    assert rates(5, warmup_steps=2) == [1.0, 2.0, 2.0, 2.0, 2.0]


def test_a_line_ends_at_the_smallest_rate():
    assert rates(5, schedule="linear", min_lr_ratio=0.5) == pytest.approx([2.0, 1.75, 1.5, 1.25, 1.0])


def test_a_cosine_after_warmup():
    expected = [2.0, *(1.0 + math.cos(math.pi * i / 3) for i in range(4))]
    assert rates(5, schedule="cosine", warmup_steps=1) == pytest.approx(expected)


@pytest.mark.parametrize(("total", "warmup"), [(94, 9), (5, 0), (3, 3)])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_warmup_from_zero_is_the_schedule_of_transformers(schedule, total, warmup):
    made = getattr(optimization, f"get_{schedule}_schedule_with_warmup")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    theirs, expected = made(optimizer, warmup, total), []
    for _ in range(total):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    found = rates(total, schedule=schedule, warmup_steps=warmup, warmup_from_zero=True)
    assert found == pytest.approx(expected, abs=1e-12)


def test_beyond_the_last_step_the_rate_stays():
    config = OptimizerConfig(lr=2.0, schedule="linear", min_lr_ratio=0.1)
    assert learning_rate(config, 99, 5) == pytest.approx(0.2)


def test_a_stage_of_one_step_has_the_full_rate():
    assert rates(1, schedule="cosine") == [2.0]
