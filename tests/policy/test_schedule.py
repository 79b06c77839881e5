import math

import pytest

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


def test_beyond_the_last_step_the_rate_stays():
    config = OptimizerConfig(lr=2.0, schedule="linear", min_lr_ratio=0.1)
    assert learning_rate(config, 99, 5) == pytest.approx(0.2)


def test_a_stage_of_one_step_has_the_full_rate():
    assert rates(1, schedule="cosine") == [2.0]
