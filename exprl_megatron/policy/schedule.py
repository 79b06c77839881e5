"""The learning rate of each optimizer step."""

import math

from exprl_megatron.config.policy import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of optimizer step number `step` (from 0) of `total_steps`.

    It rises linearly over `warmup_steps`, the last of which has the full rate (with `warmup_from_zero` the first has
    rate 0 and the step after them the full one). Then it is constant, or falls by a cosine or a line toward
    `min_lr_ratio` of it, which the step after the last would have: no step of a decay has rate 0. The decays are those
    of transformers' `get_cosine_schedule_with_warmup` and of Megatron's `OptimizerParamScheduler`.
    """
    if step < config.warmup_steps:
        return config.lr * (step + (not config.warmup_from_zero)) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    falling = total_steps - config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / falling) if falling > 0 else 0.0
    remaining = (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * remaining)
