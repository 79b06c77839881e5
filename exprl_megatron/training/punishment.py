"""What long traces lose of their scores, where their stage punishes them."""

from collections.abc import Sequence

import torch

from exprl_megatron.algorithms.scores import soft_overlong_punishment
from exprl_megatron.config.stages import RlStage
from exprl_megatron.rollout.group import GradedTrace


def length_punishments(stage: RlStage, samples: Sequence[GradedTrace]) -> torch.Tensor | None:
    """[K], float64, at most 0, to be added to the samples' scores; None where `stage` punishes no length.

    An abstention has no score that it could be added to.
    """
    soft = getattr(stage, "soft_overlong", None)
    if soft is None:
        return None
    lengths = [len(sample.trace.token_ids) for sample in samples]
    return soft.penalty * soft_overlong_punishment(lengths, *soft.lengths(stage.sampling.max_new_tokens))
