"""The learning rate of each optimizer step."""

import math

from exprl_megatron.config.policy import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step number `step` (from 0) of `total_steps`.

    It rises linearly over `warmup_steps`, the last of which has the full rate; then it is constant, or falls
    by a cosine or a line to `min_lr_ratio` of it at the last step. With `warmup_from_zero` it is transformers'
    get_linear_schedule_with_warmup and get_cosine_schedule_with_warmup.
    """
    if config.warmup_from_zero:
        total_steps += 1
    if step < config.warmup_steps:
        return config.lr * (step + (not config.warmup_from_zero)) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    falling = total_steps - 1 - config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / falling) if falling > 0 else 0.0
    remaining = (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * remaining)
