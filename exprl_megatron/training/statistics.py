"""Metrics of a step's traces and updates."""

import statistics
from collections import Counter

from exprl_megatron.config.stages import JudgedStage, RlStage
from exprl_megatron.judging.calibration import auroc, histogram
from exprl_megatron.judging.judgement import Abstained, Judgement, Scored
from exprl_megatron.rollout.group import GradedTrace, Group
from exprl_megatron.runs.progress import updates_of
from exprl_megatron.training.sample_rewards import overlong_penalties

_COUNTED_SEGMENTS = 10


def step_statistics(stage: RlStage, groups: list[Group]) -> dict[str, float]:
    """Compute `group_statistics` of the stage, and statistics of its overlong penalty."""
    found = group_statistics(groups, judged=isinstance(stage, JudgedStage))
    scored = [sample for group in groups for sample in group.samples if sample.score is not None]
    punishments = overlong_penalties(stage, scored)
    if punishments is None or not scored:
        return found
    return found | {
        "reward/overlong_punishment": punishments.mean().item(),
        "length/punished": (punishments < 0).double().mean().item(),
    }


def group_statistics(groups: list[Group], judged: bool = False) -> dict[str, float]:
    """Compute statistics of scores, lengths, abstentions and verifier results; shares are of all traces or groups.

    `judged`: the judgements come from a judge; its scores are described in detail, with the verifier's results
    in addition. Otherwise the judgements are the verifier's.
    """
    samples = [sample for group in groups for sample in group.samples]
    rewards = [sample.reward for sample in samples if sample.reward is not None]
    lengths = [len(sample.trace.token_ids) for sample in samples]
    reasons = Counter(m.judgement.reason for m in samples if isinstance(m.judgement, Abstained))
    found = {
        "reward/mean": statistics.fmean(rewards) if rewards else 0.0,
        "reward/mixed_groups": statistics.fmean(len(set(group.rewards)) > 1 for group in groups),
        "reward/groups_with_success": statistics.fmean(max(group.scores, default=0.0) == 1.0 for group in groups),
        "reward/abstained": 1 - len(rewards) / len(samples),
        "length/mean": statistics.fmean(lengths),
        "length/max": max(lengths),
        "length/overlong": statistics.fmean(sample.trace.overlong for sample in samples),
        "prompt/cached": sum(m.trace.cached_tokens for m in samples) / sum(len(m.trace.prompt_ids) for m in samples),
    }
    found |= {f"abstained/{reason}": count / len(samples) for reason, count in sorted(reasons.items())}
    found |= _verifier_statistics([[m.verified if judged else m.judgement for m in group.samples] for group in groups])
    found |= _term_statistics(samples)
    if judged:
        found |= _score_statistics(groups) | _segment_statistics(samples) | _agreement(samples)
    return found


def staleness_statistics(groups: list[Group], updates: int) -> dict[str, float]:
    """Compute by how many optimizer steps the sampling weights of tokens are older than the weights after `updates`.

    `staleness/mixed` is the share of traces whose weights changed in mid-generation.
    """
    traces = [sample.trace for group in groups for sample in group.samples]
    spans = [(updates - updates_of(version), end - start) for t in traces for version, start, end in t.weight_versions]
    return {
        "staleness/mean": sum(lag * tokens for lag, tokens in spans) / sum(tokens for _, tokens in spans),
        "staleness/max": float(max(lag for lag, _ in spans)),
        "staleness/mixed": statistics.fmean(len(trace.weight_versions) > 1 for trace in traces),
    }


def update_statistics(sums: dict[str, float], tokens: int, denominator: float | None = None) -> dict[str, float]:
    """Divide sums over response tokens into means.

    Names ending in `/max`, `/tokens` and `/sequences` and the shares `padding/` are unchanged. `loss` and `loss/...`
    are divided by `denominator`, and `sampler_gap/...` by `sampler_gap/tokens` if it is given; without tokens there is
    no gap. Where a correction weighs tokens, `correction/effective` is the share of the tokens whose mean, with equal
    weights, would have the same variance (Kish: mean squared by mean of squares).

    Args:
        sums: sums of an update's metrics.
        tokens: number of response tokens.
        denominator: denominator of the loss's aggregation; None: the number of tokens.
    """
    compared = sums.get("sampler_gap/tokens", tokens)
    divisors = {"loss": denominator or tokens, "padding": 1, "sampler_gap": compared}
    means = {}
    for name, value in sums.items():
        divisor = divisors.get(name.split("/")[0], tokens)
        if divisor:
            means[name] = value if name.endswith(("/max", "/tokens", "/sequences")) else value / divisor
    if "correction/squared" in means:
        squared = means.pop("correction/squared")
        means["correction/effective"] = means["correction/weight"] ** 2 / squared if squared else 0.0
    return means | {"tokens": tokens}


def _verifier_statistics(findings: list[list[Judgement | None]]) -> dict[str, float]:
    """Compute the share of right answers, and of groups in which all or none of the verified ones are right."""
    verified = [[f.value == 1.0 for f in group if isinstance(f, Scored)] for group in findings]
    known = [group for group in verified if group]
    if not known:
        return {}
    traces = sum(len(group) for group in findings)
    return {
        "verifier/right": statistics.fmean(right for group in known for right in group),
        "verifier/abstained": 1 - sum(map(len, known)) / traces,
        "verifier/all_right_groups": statistics.fmean(all(group) for group in known),
        "verifier/all_wrong_groups": statistics.fmean(not any(group) for group in known),
    }


def _term_statistics(samples: list[GradedTrace]) -> dict[str, float]:
    """Compute the mean of each term of a reward before weighting; {} where the reward is the score."""
    values: dict[str, list[float]] = {}
    for term in (term for sample in samples for term in sample.terms):
        if term.value is not None:
            values.setdefault(f"reward/term/{term.name}", []).append(term.value)
    return {name: statistics.fmean(of_term) for name, of_term in values.items()}


def _score_statistics(groups: list[Group]) -> dict[str, float]:
    """Compute, over all judgements: the shares of the grades 1..5, the spread within prompts, abstentions."""
    units = [[judgement for sample in group.samples for judgement in sample.judgements] for group in groups]
    scores = [[unit.value for unit in group if isinstance(unit, Scored)] for group in units]
    every = [score for group in scores for score in group]
    judged = sum(map(len, units))
    found = {"score/units": float(judged), "score/abstained": 1 - len(every) / judged}
    if not every:
        return found
    spreads = [statistics.pstdev(group) for group in scores if len(group) > 1]
    found |= {
        "score/mean": statistics.fmean(every),
        "score/std_within_prompt": statistics.fmean(spreads) if spreads else 0.0,
    }
    counts = histogram([1 + 4 * score for score in every])
    return found | {f"score/{grade}": count / len(every) for grade, count in enumerate(counts, 1)}


def _segment_statistics(samples: list[GradedTrace]) -> dict[str, float]:
    """Compute, over traces judged by segments: the number of segments, and the length of the first one."""
    cut = [sample.segments for sample in samples if sample.segments]
    if not cut:
        return {}
    shares = Counter(min(len(segments), _COUNTED_SEGMENTS + 1) for segments in cut)
    first = sum(segments[0].end - segments[0].start for segments in cut)
    return {
        "segments/mean": statistics.fmean(map(len, cut)),
        "segments/single_share": shares[1] / len(cut),
        **{f"segments/count_{n}": shares[n] / len(cut) for n in range(1, _COUNTED_SEGMENTS + 1)},
        f"segments/count_over_{_COUNTED_SEGMENTS}": shares[_COUNTED_SEGMENTS + 1] / len(cut),
        "segments/first_token_share": first / sum(segments[-1].end for segments in cut),
    }


def _agreement(samples: list[GradedTrace]) -> dict[str, float]:
    """Compute the AUROC of the judge's scores for the verifier's results; {} where all are right or all wrong."""
    pairs = [
        (sample.score, sample.verified.value == 1.0)
        for sample in samples
        if isinstance(sample.verified, Scored) and sample.score is not None
    ]
    scores, right = [score for score, _ in pairs], [is_right for _, is_right in pairs]
    return {"judge/auroc": auroc(scores, right)} if any(right) and not all(right) else {}
