"""Log-probs and entropy of the response tokens, without ever holding their logits all at once.

With logits x (hidden state times output weight, over temperature) and p = softmax(x):

    log p_t = x_t - logsumexp(x)                d log p_t / d x_j = [j = t] - p_j
    H = -sum_j p_j log p_j                      d H / d x_j       = -p_j (log p_j + H)

Logits exist in fp32, for one tile of tokens times rows of the vocabulary at a time, and are computed again in the
backward pass. Over the tiles of a token run its highest logit m, S = sum_j exp(x_j - m) and
U = sum_j exp(x_j - m) (x_j - m), rescaled where m grows (Milakov and Gimelshein, arXiv 1805.02867); then
logsumexp(x) = m + log S and H = log S - U / S. The vocabulary is cut over tensor-parallel ranks, whose m, S and U are
combined in the same way.

The KL terms of the losses (algorithms.losses) need no logits: they are estimated from the log-probs of the sampled
tokens, which are what this module gives.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)

PADDED = -1e30
"""Logit of the rows that only pad the vocabulary: finite, so that 0 * PADDED is 0."""
TILE_ROWS = 4096
"""Rows of the vocabulary in a tile, at most."""
TILE_BYTES = 2**28
"""All copies of a tile's logits together: two in fp32, one in the model's format."""


def response_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    places: torch.Tensor,
    slots: torch.Tensor,
    *,
    temperature: float,
    vocabulary: int,
    chunk: int | None,
    sequence_parallel: bool,
) -> torch.Tensor:
    """Return log-probs and entropy, stacked: [2, batch, length], fp32; 0 where no response token is the target.

    hidden: [columns, rows, hidden] (under sequence parallelism this rank's part of the columns); weight: this
    tensor-parallel rank's rows of the output layer; targets: [batch, length]; places, slots: see ModelInput;
    vocabulary: rows without padding; chunk: tokens whose logits exist at the same time (None: TILE_BYTES decides).
    Differentiable in hidden and weight. Every context-parallel rank gets the whole result, and its gradient flows
    into the rank's own tokens: the sum of weight gradients over the group is that of one loss.

    More than 7 parameters: the tensors and sizes of one fused operation.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    if sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
    rows, wanted = hidden.flatten(0, 1)[places], targets.flatten()[slots]
    values = VocabularyParallelLogProbs.apply(rows, weight, wanted, temperature, vocabulary, chunk, group)
    result = torch.zeros(2, targets.numel(), dtype=torch.float32, device=hidden.device)
    result[:, slots] = values
    result = reduce_from_tensor_model_parallel_region(result, group=parallel_state.get_context_parallel_group())
    return result.view(2, *targets.shape)


class VocabularyParallelLogProbs(torch.autograd.Function):
    """hidden [n, h], weight [v, h], targets [n] -> log-probs and entropy [2, n]; see the module's docstring."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, vocabulary, chunk, group):
        """Compute log-probs and entropy of the targets.

        More than 7 parameters: torch passes the inputs of an autograd function one by one.
        """
        first = weight.shape[0] * group.rank()
        real = min(max(vocabulary - first, 0), weight.shape[0])
        tiles = _Tiles(weight, temperature, real, chunk)
        values = torch.empty(2, len(targets), dtype=torch.float32, device=hidden.device)
        log_sums = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        for part in tiles.parts(len(targets)):
            at_target, highest, sums = tiles.read(hidden[part], targets[part] - first)
            overall = highest.clone()
            _all_reduce(overall, dist.ReduceOp.MAX, group)
            message = torch.stack([at_target, *_rescaled(sums, highest, overall)])
            _all_reduce(message, dist.ReduceOp.SUM, group)
            log_sum = message[1].log()
            values[0, part] = message[0] - overall - log_sum
            values[1, part] = log_sum - message[2] / message[1]
            log_sums[part] = log_sum + overall
        ctx.save_for_backward(hidden, weight, targets - first, log_sums, values[1])
        ctx.constants = temperature, real, chunk
        return values

    @staticmethod
    def backward(ctx, grad):
        """Return the gradients of hidden states and weight, of their shapes, from that of the log-probs, [slots]."""
        hidden, weight, targets, log_sums, entropy = ctx.saved_tensors
        tiles = _Tiles(weight, *ctx.constants)
        # Block after block of the vocabulary: no second copy of the weight's gradient is needed in fp32.
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        grad_weight = torch.empty_like(weight)
        for rows in tiles.blocks():
            grad_rows = torch.zeros_like(weight[rows], dtype=torch.float32)
            for part in tiles.parts(len(targets)):
                log_p = tiles.logits(hidden[part], rows).sub_(log_sums[part, None])
                p = log_p.exp()
                grad_logits = log_p.add_(entropy[part, None]).mul_(grad[1, part, None]).add_(grad[0, part, None])
                grad_logits.mul_(p).neg_()
                own, place = _within(targets[part], rows)
                grad_logits.scatter_add_(1, place[:, None], (grad[0, part] * own)[:, None])
                grad_logits = grad_logits.div_(tiles.temperature).to(hidden.dtype)
                _add_product(grad_hidden[part], grad_logits, weight[rows])
                _add_product(grad_rows, grad_logits.T, hidden[part])
            grad_weight[rows] = grad_rows
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None, None, None


@dataclass(frozen=True)
class _Tiles:
    """The logits of a rank's rows of the vocabulary, tile by tile."""

    weight: torch.Tensor
    temperature: float
    real: int
    """Rows that do not only pad the vocabulary."""
    chunk: int | None

    def blocks(self) -> list[slice]:
        """Return the rows, cut."""
        return _slices(len(self.weight), TILE_ROWS)

    def parts(self, tokens: int) -> list[slice]:
        """Return the tokens, cut."""
        logit_bytes = 2 * 4 + self.weight.element_size()
        return _slices(tokens, self.chunk or TILE_BYTES // (min(len(self.weight), TILE_ROWS) * logit_bytes))

    def logits(self, hidden: torch.Tensor, rows: slice) -> torch.Tensor:
        """Return the logits, [tokens, rows], fp32."""
        logits = torch.nn.functional.linear(hidden, self.weight[rows]).float().div_(self.temperature)
        logits[:, max(self.real - rows.start, 0) :] = PADDED
        return logits

    def read(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return, of all blocks, the target's logit (0 where it is another rank's), m, and S and U stacked; each
        [tokens].
        """
        at_target = torch.zeros(len(targets), dtype=torch.float32, device=hidden.device)
        highest = torch.full_like(at_target, PADDED)
        sums = torch.zeros(2, len(targets), dtype=torch.float32, device=hidden.device)
        for rows in self.blocks():
            logits = self.logits(hidden, rows)
            own, place = _within(targets, rows)
            at_target += logits.gather(1, place[:, None])[:, 0] * own
            higher = torch.maximum(highest, logits.amax(dim=1))
            sums = torch.stack(_rescaled(sums, highest, higher))
            highest = higher
            weights = logits.sub_(highest[:, None]).exp()
            sums[0] += weights.sum(dim=1)
            sums[1] += weights.mul_(logits).sum(dim=1)
        return at_target, highest, sums


def _rescaled(sums: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return S and U relative to `new` in place of `old`."""
    factor, shift = (old - new).exp(), old - new
    return sums[0] * factor, (sums[1] + sums[0] * shift) * factor


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _within(targets: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which targets are in these rows (1.0 or 0.0), and their place there (0 for the others)."""
    own = (targets >= rows.start) & (targets < rows.stop)
    return own.float(), torch.where(own, targets - rows.start, 0)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left @ right to total (fp32), without a copy where all are fp32."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _all_reduce(tensor: torch.Tensor, operation: dist.ReduceOp, group: dist.ProcessGroup) -> None:
    if group.size() > 1:
        dist.all_reduce(tensor, operation, group=group)
