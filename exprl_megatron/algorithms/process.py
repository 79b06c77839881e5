"""Process rewards: estimators that compute one advantage for each segment from the scores of a trace's segments.

s_1..s_T are the scores of one trace, in [0, 1]; K is the number of traces of a problem. The equations are those of the
ExpRL paper (arXiv 2606.17024). Three variants:

* `recommended`, the default: the equations; an EndNorm trace of a single segment gets 0, like a DeltaNorm one (a
  trace must not gain from having a single segment); a trace with an abstained segment is excluded from the loss, from K
  and from every mean; an overlong trace is excluded from the baselines, and its own advantage is a setting.
* `paper`: the exact equations (EndNorm gives a single segment s_1); an overlong trace's scores are all 0. The paper
  does not define abstentions, BatchNorm and basic scores: there this is the recommended form.
* `code`: the arithmetic of the released code, with its sentinel -100 in place of a missing score.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from statistics import fmean
from typing import Literal

SegmentEstimator = Literal["delta", "end", "group", "batch", "basic"]
ProcessVariant = Literal["recommended", "paper", "code"]
OverlongRule = Literal["zero", "penalize", "exclude"]

SENTINEL = -100.0
"""The released code's value for a missing score."""
_LENGTH_EPSILON = 1e-8


@dataclass(frozen=True)
class SegmentedTrace:
    """The scores and lengths of a trace's segments, of which there is at least one."""

    scores: tuple[float | None, ...]
    """One for each segment, in [0, 1]; None: the judge abstained."""
    lengths: tuple[int, ...]
    """The segments' lengths in tokens."""
    overlong: bool = False

    @property
    def valid(self) -> bool:
        """Whether every segment has a score."""
        return None not in self.scores

    @property
    def given_scores(self) -> tuple[float, ...]:
        """The scores of the segments that have one; all of them where the trace is valid."""
        return tuple(score for score in self.scores if score is not None)


@dataclass(frozen=True)
class Credit:
    """The advantage of each segment, and whether the trace is in the loss."""

    advantages: tuple[float, ...]
    in_loss: bool = True


def process_credits(
    groups: Sequence[Sequence[SegmentedTrace]],
    estimator: SegmentEstimator,
    variant: ProcessVariant = "recommended",
    overlong: OverlongRule = "zero",
    padded_length: int | None = None,
) -> list[list[Credit]]:
    """Compute the Credit of every trace of every group of one batch, in order.

    Args:
        groups: the traces of each problem.
        estimator: the equation.
        variant: see the top of this file.
        overlong: what the recommended variant gives an overlong trace: the advantage 0, minus the mean last score of
            the group's valid traces, or no place in the loss.
        padded_length: number of tokens to which the released code pads responses; its GroupNorm needs it.

    Raises:
        ValueError: the released code's GroupNorm has no `padded_length`.
    """
    if variant == "code":
        return _released_credits(groups, estimator, padded_length)
    if variant == "paper":
        groups = [[_zeroed(trace) if trace.overlong else trace for trace in group] for group in groups]
    batch_mean = mean_score(list(chain.from_iterable(groups)))
    return [
        _group_credits(group, batch_mean if estimator == "batch" else mean_score(group), estimator, variant, overlong)
        for group in groups
    ]


def delta_norm(scores: Sequence[float]) -> tuple[float, ...]:
    """Compute A_t = s_t - s_(t-1), and A_1 = s_1 - s_T, which sum to 0 (equations 2 and 5)."""
    return tuple(score - before for score, before in zip(scores, (scores[-1], *scores[:-1]), strict=True))


def end_norm(scores: Sequence[float]) -> tuple[float, ...]:
    """Compute A_t = s_t - s_T before the last segment, and A_T = s_T (equation 4)."""
    return (*(score - scores[-1] for score in scores[:-1]), scores[-1])


def mean_score(traces: Sequence[SegmentedTrace]) -> float:
    """Compute the mean over valid traces that are not overlong of the mean over their segments; 0 if there is none.

    It is the baseline of GroupNorm, A_t = s_t - (1/K) sum_k (1/T_k) sum_t s_kt (equation 6), and over all groups
    the baseline of BatchNorm.
    """
    means = [fmean(trace.given_scores) for trace in traces if trace.valid and not trace.overlong]
    return fmean(means) if means else 0.0


def _group_credits(
    group: Sequence[SegmentedTrace],
    baseline: float,
    estimator: SegmentEstimator,
    variant: ProcessVariant,
    overlong: OverlongRule,
) -> list[Credit]:
    last_scores = [trace.given_scores[-1] for trace in group if trace.valid]
    credits = []
    for trace in group:
        nothing = (0.0,) * len(trace.scores)
        if not trace.valid or (trace.overlong and overlong == "exclude"):
            credits.append(Credit(nothing, in_loss=False))
        elif trace.overlong:
            penalty = fmean(last_scores) if overlong == "penalize" else 0.0
            credits.append(Credit(tuple(-penalty for _ in nothing)))
        elif estimator == "end" and len(nothing) == 1 and variant == "recommended":
            credits.append(Credit(nothing))
        else:
            credits.append(Credit(_equation(trace.given_scores, baseline, estimator)))
    return credits


def _equation(scores: Sequence[float], baseline: float, estimator: SegmentEstimator) -> tuple[float, ...]:
    if estimator == "delta":
        return delta_norm(scores)
    if estimator == "end":
        return end_norm(scores)
    return tuple(score - (0.0 if estimator == "basic" else baseline) for score in scores)


def _zeroed(trace: SegmentedTrace) -> SegmentedTrace:
    """Return the trace as one that is not overlong and whose scores are all 0."""
    return replace(trace, scores=tuple(None if s is None else 0.0 for s in trace.scores), overlong=False)


def _released_credits(
    groups: Sequence[Sequence[SegmentedTrace]], estimator: SegmentEstimator, padded_length: int | None
) -> list[list[Credit]]:
    rewards = [[released_rewards(trace, estimator == "delta") for trace in group] for group in groups]
    if estimator in ("delta", "basic"):
        return rewards
    if estimator == "end":
        return [
            [_shifted(credit, trace.scores[-1] or 0.0) for credit, trace in zip(credits, group, strict=True)]
            for credits, group in zip(rewards, groups, strict=True)
        ]
    means = [list(map(_token_mean, credits, group)) for credits, group in zip(rewards, groups, strict=True)]
    if estimator == "batch":
        baselines = [fmean(chain.from_iterable(means))] * len(groups)
    elif padded_length is None:
        raise ValueError("the released code's GroupNorm needs padded_length, the length of padded responses")
    else:
        # The released code averages over the padded tokens after it has divided by the response's own tokens.
        baselines = [fmean(of_group) / padded_length for of_group in means]
    return [
        [_shifted(credit, baseline) for credit in credits] for credits, baseline in zip(rewards, baselines, strict=True)
    ]


def released_rewards(trace: SegmentedTrace, difference: bool) -> Credit:
    """Compute the released code's reward of each segment, and whether the trace stays in its loss.

    With `difference` (DeltaNorm) a reward is the score minus the previous score, and s_T is subtracted from segment 1
    before the last segment's reward is written: a single segment thus gets s_1. A missing score is -100, and the trace
    is masked where a reward equals -100; if s_T > 0 was subtracted from it, it does not equal -100, and the trace stays
    in the loss. An overlong trace that is not masked has the reward 0 everywhere.
    """
    rewards, before = [0.0] * len(trace.scores), 0.0
    for t, score in enumerate(trace.scores):
        if score is None:
            rewards[t] = SENTINEL
            continue
        if difference and t == len(rewards) - 1:
            rewards[0] -= score
        rewards[t] = score - before
        before = score if difference else 0.0
    in_loss = SENTINEL not in rewards
    return Credit((0.0,) * len(rewards) if in_loss and trace.overlong else tuple(rewards), in_loss)


def _shifted(credit: Credit, baseline: float) -> Credit:
    return replace(credit, advantages=tuple(advantage - baseline for advantage in credit.advantages))


def _token_mean(credit: Credit, trace: SegmentedTrace) -> float:
    """Compute the mean reward of a trace's tokens; 0 where the trace is masked."""
    total = sum(reward * length for reward, length in zip(credit.advantages, trace.lengths, strict=True))
    return total / (sum(trace.lengths) + _LENGTH_EPSILON) if credit.in_loss else 0.0
