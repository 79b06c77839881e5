import math
from types import SimpleNamespace

import pytest
import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from transformers import optimization

from exprl_megatron.config.policy import OptimizerConfig
from exprl_megatron.policy.schedule import learning_rate


def rates(total: int, **settings) -> list[float]:
    config = OptimizerConfig(lr=2.0, **settings)
    return [learning_rate(config, step, total) for step in range(total)]


def test_constant_after_a_linear_warmup():
    assert rates(5, warmup_steps=2) == [1.0, 2.0, 2.0, 2.0, 2.0]


def test_a_line_would_have_the_smallest_rate_one_step_after_its_last():
    assert rates(5, schedule="linear", min_lr_ratio=0.5) == pytest.approx([2.0, 1.8, 1.6, 1.4, 1.2])


def test_a_cosine_after_warmup():
    expected = [2.0, *(1.0 + math.cos(math.pi * i / 4) for i in range(4))]
    assert rates(5, schedule="cosine", warmup_steps=1) == pytest.approx(expected)


@pytest.mark.parametrize("warmup", [0, 1, 3, 20])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_every_step_of_a_schedule_learns(schedule, warmup):
    assert min(rates(20, schedule=schedule, warmup_steps=warmup)) > 0


@pytest.mark.parametrize("ratio", [0.0, 0.1])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_decay_is_that_of_megatron(schedule, ratio):
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0}])
    theirs = OptimizerParamScheduler(optimizer, 0.0, 2.0, 2.0 * ratio, 3, 20, schedule, 0.0, 0.0, 20, "constant")
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        theirs.step(1)
    found = rates(20, schedule=schedule, warmup_steps=3, min_lr_ratio=ratio)
    assert found[3:] == pytest.approx(expected[3:])
    # Megatron's warm-up begins at 0: it is one step behind.
    assert found[:3] == pytest.approx(expected[1:4])


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
