"""Aggregation of token losses: a weight for each token of a micro-batch and one denominator for the update.

The loss of an update is the sum of (token loss * weight) over all micro-batches and data-parallel ranks, divided by the
denominator. The weight of a token depends only on its own sequence, so that neither packing nor the layout changes the
result; `micro-batch-mean` is the exception, by definition.

| aggregation      | weight of a token           | denominator                    | loss of the update               |
|------------------|-----------------------------|--------------------------------|----------------------------------|
| token-mean       | 1                           | response tokens                | mean over all tokens             |
| sequence-mean    | 1 / tokens of its sequence  | sequences                      | mean of the sequences' means     |
| sequence-sum     | 1                           | sequences                      | mean of the sequences' sums      |
| constant-length  | 1                           | sequences * max_new_tokens     | the same by a constant length    |
| micro-batch-mean | sequences / tokens, both of | sequences                      | mean of the micro-batches' token |
|                  | its micro-batch             |                                | means, weighted by sequences     |

Papers: token-mean DAPO (arXiv 2503.14476), sequence-mean GRPO (arXiv 2402.03300), sequence-sum ExpRL
(arXiv 2606.17024, equation 1), constant-length Dr. GRPO (arXiv 2503.20783); micro-batch-mean is what ExpRL's released
first-stage code does, where every data-parallel rank has as many sequences.
"""

from collections.abc import Mapping, Sequence

import torch

from exprl_megatron.algorithms.batch import SampleOrOutline
from exprl_megatron.config.losses import Aggregation


def token_weights(mask: torch.Tensor, aggregation: Aggregation) -> torch.Tensor:
    """Compute the weight of each token of a micro-batch: [B, T], float32, 0 where `mask` is 0.

    `mask` [B, T] is 1.0 at response tokens. Each row is one sequence; rows without a response do not count.
    """
    tokens = mask.sum(dim=-1, keepdim=True)  # [B, 1]
    if aggregation == "sequence-mean":
        return mask / tokens.clamp(min=1)
    if aggregation == "micro-batch-mean":
        return mask * (tokens > 0).sum() / tokens.sum().clamp(min=1)
    return mask


def denominator_of(aggregation: Aggregation, samples: Sequence[SampleOrOutline], max_new_tokens: int) -> float:
    """Compute the denominator of an update.

    Args:
        aggregation: the config's aggregation.
        samples: all samples of the update, on all ranks; those without a response do not count.
        max_new_tokens: the limit of the stage's sampling, which only `constant-length` uses.

    Raises:
        ValueError: no sample has a response token.
    """
    tokens = sum(sample.response_tokens for sample in samples)
    if not tokens:
        raise ValueError("there is no response token to take a loss of")
    return _divisor(aggregation, tokens, sum(sample.response_tokens > 0 for sample in samples), max_new_tokens)


def accepted_denominator(
    aggregation: Aggregation, sums: Mapping[str, float], max_new_tokens: int, denominator: float
) -> float:
    """Compute the denominator of an update in which rejected tokens do not count; `denominator` where they count.

    `sums` are the metrics of the update. They contain `accepted/tokens` and `accepted/sequences` where only accepted
    tokens and sequences count. If all are rejected, the sum of losses is 0 and `denominator` is returned.
    """
    if not sums.get("accepted/tokens"):
        return denominator
    return _divisor(aggregation, sums["accepted/tokens"], sums["accepted/sequences"], max_new_tokens)


def _divisor(aggregation: Aggregation, tokens: float, sequences: float, max_new_tokens: int) -> float:
    if aggregation == "token-mean":
        return float(tokens)
    return float(sequences * max_new_tokens if aggregation == "constant-length" else sequences)
