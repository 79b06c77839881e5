"""From the losses of tokens to one number: a weight for each token of a micro-batch, and one denominator for all.

The sum over all micro-batches and data-parallel ranks of (loss * weight), divided by the denominator, is the
aggregation of the whole update. A token's weight follows from its own sequence alone, so that neither packing nor
layout changes the result; `micro-batch-mean` is the exception, by its definition.

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

from collections.abc import Mapping
from collections.abc import Sequence as ListLike

import torch

from exprl_megatron.algorithms.batch import LearnedFrom
from exprl_megatron.config.losses import Aggregation


def token_weights(mask: torch.Tensor, aggregation: Aggregation) -> torch.Tensor:
    """The weight of each token of a micro-batch [batch, length]; 0 where `mask` (1.0 at response tokens) is.

    Rows are whole sequences; rows without a response count for nothing.
    """
    tokens = mask.sum(dim=-1, keepdim=True)
    if aggregation == "sequence-mean":
        return mask / tokens.clamp(min=1)
    if aggregation == "micro-batch-mean":
        return mask * (tokens > 0).sum() / tokens.sum().clamp(min=1)
    return mask


def denominator(aggregation: Aggregation, sequences: ListLike[LearnedFrom], max_new_tokens: int) -> float:
    """What the weighted sum over all `sequences` of an update is divided by; sequences without a response do not count.

    `max_new_tokens` is the sampling's; only `constant-length` looks at it. Raises ValueError where there is no
    response token at all.
    """
    tokens = sum(sequence.response_tokens for sequence in sequences)
    if not tokens:
        raise ValueError("there is no response token to take a loss of")
    return _divisor(aggregation, tokens, sum(sequence.response_tokens > 0 for sequence in sequences), max_new_tokens)


def kept_denominator(aggregation: Aggregation, sums: Mapping[str, float], max_new_tokens: int, whole: float) -> float:
    """What the weighted sum is to be divided by where rejected tokens do not count; `whole`, where they do.

    `sums` are an update's metrics; with `kept/tokens` and `kept/sequences` among them the kept ones alone count. Where
    nothing is kept the sum is 0, and `whole` divides it as well as anything.
    """
    if not sums.get("kept/tokens"):
        return whole
    return _divisor(aggregation, sums["kept/tokens"], sums["kept/sequences"], max_new_tokens)


def _divisor(aggregation: Aggregation, tokens: float, sequences: float, max_new_tokens: int) -> float:
    if aggregation == "token-mean":
        return float(tokens)
    return float(sequences * max_new_tokens if aggregation == "constant-length" else sequences)
