"""The weight of the router's load-balancing loss in a step."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel


def weight_balance_loss_by_tokens(chunks: Sequence[GPTModel], own_tokens: int) -> None:
    """Make the loss the mean over all micro-batches of the coming backward pass, weighted by their tokens.

    `own_tokens`: of this rank's micro-batches, with padding. A collective of the data-parallel ranks. Where Megatron
    divides gradients by a count of tokens at the end, its router multiplies a micro-batch's loss by its tokens;
    the policy has divided its own loss before, so here it is done by the scale of this one.
    """
    device = next(chunks[0].parameters()).device
    tokens = torch.tensor([float(own_tokens)], device=device)
    dist.all_reduce(tokens, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    for chunk in chunks:
        chunk.config.moe_grad_scale_func = tokens.reciprocal
