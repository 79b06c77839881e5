"""Policy losses: `loss.surrogate: examples.losses:FUNCTION` of a stage."""

import torch

from exprl_megatron.api import SurrogateBatch

POSITIVE, NEGATIVE = 1.0, 1.05


def soft_gate(batch: SurrogateBatch) -> torch.Tensor:
    """Compute SAPO's loss of each token [B, T]: the ratio passes a soft gate instead of a clip (arXiv 2511.20347).

    loss = -A 4 sigmoid(tau (r - 1)) / tau, with tau = 1 where A > 0 and else 1.05. Its gradient at r = 1 is that of
    the plain policy gradient, and it vanishes smoothly as r leaves 1. KL, entropy, corrections and the aggregation are
    added by the stage's other settings.
    """
    ratio = torch.exp(batch.log_probs - batch.old_log_probs)
    tau = torch.where(batch.advantages > 0, POSITIVE, NEGATIVE)
    return -batch.advantages * 4 * torch.sigmoid(tau * (ratio - 1)) / tau
