"""What a step's traces and updates look like, as named numbers for the logs."""

import statistics
from collections import Counter

from exprl_megatron.config.stages import JudgedStage, RlStage
from exprl_megatron.judging.calibration import auroc, histogram
from exprl_megatron.judging.judgement import Abstained, Judgement, Scored
from exprl_megatron.rollout.group import GradedTrace, Group
from exprl_megatron.runs.progress import updates_of
from exprl_megatron.training.punishment import length_punishments

_COUNTED_SEGMENTS = 10


def step_statistics(stage: RlStage, groups: list[Group]) -> dict[str, float]:
    """`group_statistics` of the stage's judgements, and what its long traces lose."""
    found = group_statistics(groups, judged=isinstance(stage, JudgedStage))
    scored = [member for group in groups for member in group.members if member.score is not None]
    punishments = length_punishments(stage, scored)
    if punishments is None or not scored:
        return found
    return found | {
        "reward/overlong_punishment": punishments.mean().item(),
        "length/punished": (punishments < 0).double().mean().item(),
    }


def group_statistics(groups: list[Group], judged: bool = False) -> dict[str, float]:
    """Scores, lengths, abstentions, the verifier's findings; shares are of all traces or of all groups.

    `judged`: the judgements are a judge's, whose scores are shown in detail, and the verifier's findings stand
    beside them; else the judgements are the verifier's own.
    """
    members = [member for group in groups for member in group.members]
    scores = [member.score for member in members if member.score is not None]
    lengths = [len(member.trace.token_ids) for member in members]
    reasons = Counter(m.judgement.reason for m in members if isinstance(m.judgement, Abstained))
    found = {
        "reward/mean": statistics.fmean(scores) if scores else 0.0,
        "reward/mixed_groups": statistics.fmean(len(set(group.scores)) > 1 for group in groups),
        "reward/groups_with_success": statistics.fmean(max(group.scores, default=0.0) == 1.0 for group in groups),
        "reward/abstained": 1 - len(scores) / len(members),
        "length/mean": statistics.fmean(lengths),
        "length/max": max(lengths),
        "length/overlong": statistics.fmean(member.trace.overlong for member in members),
        "prompt/cached": sum(m.trace.cached_tokens for m in members) / sum(len(m.trace.prompt_ids) for m in members),
    }
    found |= {f"abstained/{reason}": count / len(members) for reason, count in sorted(reasons.items())}
    found |= _verifier_statistics([[m.verified if judged else m.judgement for m in group.members] for group in groups])
    if judged:
        found |= _score_statistics(groups) | _segment_statistics(members) | _agreement(members)
    return found


def staleness_statistics(groups: list[Group], updates: int) -> dict[str, float]:
    """How many optimizer steps the weights of sampled tokens are behind those after `updates`, which learn from them.

    `staleness/mixed` is the share of traces whose weights changed in mid-generation.
    """
    traces = [member.trace for group in groups for member in group.members]
    spans = [(updates - updates_of(version), end - start) for t in traces for version, start, end in t.weight_versions]
    return {
        "staleness/mean": sum(lag * tokens for lag, tokens in spans) / sum(tokens for _, tokens in spans),
        "staleness/max": float(max(lag for lag, _ in spans)),
        "staleness/mixed": statistics.fmean(len(trace.weight_versions) > 1 for trace in traces),
    }


def update_statistics(sums: dict[str, float], tokens: int, denominator: float | None = None) -> dict[str, float]:
    """Sums over response tokens become means; names that end in `/max`, `/tokens` or `/sequences` stay, `padding/` are
    shares.

    `loss` and what begins with `loss/` are divided by `denominator`, which is that of the loss's aggregation
    (None: the number of tokens), and what begins with `sampler_gap/` by `sampler_gap/tokens`, if given: of no tokens
    there is no gap. Where a correction weighs tokens, `correction/effective` is the share of the tokens whose mean,
    with equal weights, would have the same variance (Kish: mean squared by mean of squares).
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
    """Of each group's findings: right answers, and groups in which all or none of those verified are right."""
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


def _score_statistics(groups: list[Group]) -> dict[str, float]:
    """Of everything that was judged, segment or trace: shares of the grades 1..5, spread, abstentions."""
    units = [[judgement for member in group.members for judgement in member.units] for group in groups]
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


def _segment_statistics(members: list[GradedTrace]) -> dict[str, float]:
    """Of the traces that were judged by segments: how many these have, and how long the first one is."""
    cut = [member.segments for member in members if member.segments]
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


def _agreement(members: list[GradedTrace]) -> dict[str, float]:
    """The judge's scores against the verifier's findings; nothing where one of right and wrong is missing."""
    verified = [member for member in members if isinstance(member.verified, Scored) and member.score is not None]
    scores, right = [member.score for member in verified], [member.verified.value == 1.0 for member in verified]
    return {"judge/auroc": auroc(scores, right)} if any(right) and not all(right) else {}
