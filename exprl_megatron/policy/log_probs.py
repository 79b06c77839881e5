"""Log-probs and entropy of the response tokens, without ever holding their logits all at once.

With logits x (hidden state times output weight, over temperature) and p = softmax(x):

    log p_t = x_t - logsumexp(x)                d log p_t / d x_j = [j = t] - p_j
    H = -sum_j p_j log p_j                      d H / d x_j       = -p_j (log p_j + H)

The vocabulary is cut over tensor-parallel ranks; sums over it are all-reduced. Logits exist in fp32, for
one chunk of tokens at a time, and are computed again in the backward pass.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

PADDED = -1e30
"""Logit of the rows that only pad the vocabulary: finite, so that 0 * PADDED is 0."""


def response_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor,
    *,
    temperature: float,
    vocabulary: int,
    chunk: int,
    sequence_parallel: bool,
) -> torch.Tensor:
    """Log-probs and entropy, stacked: [2, batch, length], fp32; 0 where `mask` is 0.

    hidden: [length, batch, hidden] (under sequence parallelism this rank's part of the length); weight: this
    tensor-parallel rank's rows of the output layer; targets, mask: [batch, length]; vocabulary: rows without
    padding; chunk: tokens whose logits exist at the same time. Differentiable in hidden and weight.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    if sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
    wanted = mask > 0
    rows = hidden.transpose(0, 1)[wanted]
    values = VocabularyParallelLogProbs.apply(rows, weight, targets[wanted], temperature, vocabulary, chunk, group)
    result = torch.zeros(2, *mask.shape, dtype=torch.float32, device=hidden.device)
    result[:, wanted] = values
    return result


class VocabularyParallelLogProbs(torch.autograd.Function):
    """hidden [n, h], weight [v, h], targets [n] -> log-probs and entropy [2, n]; see the module's docstring."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, vocabulary, chunk, group):
        first = weight.shape[0] * group.rank()
        real = min(max(vocabulary - first, 0), weight.shape[0])
        values = torch.empty(2, len(targets), dtype=torch.float32, device=hidden.device)
        log_sums = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        for part in _chunks(len(targets), chunk):
            logits = _logits(hidden[part], weight, temperature, real)
            highest = logits.amax(dim=1)
            _all_reduce(highest, dist.ReduceOp.MAX, group)
            logits -= highest[:, None]
            own, place = _own_targets(targets[part], first, weight.shape[0])
            at_target = logits.gather(1, place[:, None])[:, 0] * own
            weights = logits.exp()
            sums = torch.stack([weights.sum(dim=1), (weights * logits).sum(dim=1), at_target])
            _all_reduce(sums, dist.ReduceOp.SUM, group)
            log_sum = sums[0].log()
            values[0, part] = sums[2] - log_sum
            values[1, part] = log_sum - sums[1] / sums[0]
            log_sums[part] = log_sum + highest
        ctx.save_for_backward(hidden, weight, targets, log_sums, values[1])
        ctx.constants = temperature, first, real, chunk
        return values

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, log_sums, entropy = ctx.saved_tensors
        temperature, first, real, chunk = ctx.constants
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for part in _chunks(len(targets), chunk):
            log_p = _logits(hidden[part], weight, temperature, real) - log_sums[part, None]
            p = log_p.exp()
            own, place = _own_targets(targets[part], first, weight.shape[0])
            grad_logits = -p * (grad[0, part, None] + grad[1, part, None] * (log_p + entropy[part, None]))
            grad_logits.scatter_add_(1, place[:, None], (grad[0, part] * own)[:, None])
            grad_logits = (grad_logits / temperature).to(hidden.dtype)
            grad_hidden[part] = grad_logits @ weight
            grad_weight += grad_logits.T @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _logits(hidden: torch.Tensor, weight: torch.Tensor, temperature: float, real: int) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden, weight).float() / temperature
    logits[:, real:] = PADDED
    return logits


def _own_targets(targets: torch.Tensor, first: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which targets lie in this rank's part of the vocabulary (1.0 or 0.0), and where there (0 for the others)."""
    place = targets - first
    own = (place >= 0) & (place < rows)
    return own.float(), torch.where(own, place, 0)


def _all_reduce(tensor: torch.Tensor, operation: dist.ReduceOp, group: dist.ProcessGroup) -> None:
    if group.size() > 1:
        dist.all_reduce(tensor, operation, group=group)
