"""Selects the groups and traces that are shown, and sorts them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from exprl_megatron.inspection.rollout_steps import InspectedGroup
from exprl_megatron.inspection.sort_key import SortKey
from exprl_megatron.judging.judgement import Abstained, Scored
from exprl_megatron.rollout.group import GradedTrace, Group


@dataclass(frozen=True)
class Selection:
    """Conditions on the shown traces, and their order; None: no such condition."""

    problem: str | None = None
    sample: int | None = None
    abstained: bool = False
    sort: SortKey | None = None
    ascending: bool = False


@dataclass(frozen=True)
class SelectedGroup:
    """A group, and the places in it of the traces that are shown, in their order."""

    inspected: InspectedGroup
    places: tuple[int, ...]


def select(groups: Iterable[InspectedGroup], selection: Selection) -> list[SelectedGroup]:
    """Return the groups with at least one trace that is asked for, in the order that is asked for.

    Without a sort key the order is the log's. What has no value to sort by (no score, nothing to disagree with) comes
    last.
    """
    chosen = [
        SelectedGroup(each, places)
        for each in groups
        if selection.problem in (None, each.group.problem_id) and (places := _places(each, selection))
    ]
    if selection.sort is None:
        return chosen
    key = _GROUP_KEYS[selection.sort]
    return _ordered(chosen, lambda each: key(each.inspected), selection.ascending)


def score_spread(group: Group) -> float | None:
    """Return the highest minus the lowest score of the group; None where it has no score."""
    return max(group.scores) - min(group.scores) if group.scores else None


def group_mean_score(group: Group) -> float | None:
    """Return the mean over the traces with a score; None where there is none."""
    return sum(group.scores) / len(group.scores) if group.scores else None


def mean_tokens(group: Group) -> float:
    """Return the mean length of the responses."""
    return sum(map(_tokens, group.samples)) / len(group.samples)


def disagreement(sample: GradedTrace) -> float | None:
    """Return |judge's score - verifier's|; None where one of them has none."""
    if sample.score is None or not isinstance(sample.verified, Scored):
        return None
    return abs(sample.score - sample.verified.value)


def has_abstention(sample: GradedTrace) -> bool:
    """Return whether the trace, or any of its segments, has no score."""
    return any(isinstance(judgement, Abstained) for judgement in (sample.judgement, *sample.judgements))


def _places(inspected: InspectedGroup, selection: Selection) -> tuple[int, ...]:
    places = [
        place
        for place, sample in enumerate(inspected.group.samples)
        if selection.sample in (None, sample.trace.sample) and (not selection.abstained or has_abstention(sample))
    ]
    key = _TRACE_KEYS.get(selection.sort)
    if key is None:
        return tuple(places)
    return tuple(_ordered(places, lambda place: key(inspected, place), selection.ascending))


def _ordered[Item](items: list[Item], key: Callable[[Item], float | None], ascending: bool) -> list[Item]:
    sign = 1 if ascending else -1

    def order(item: Item) -> tuple[bool, float]:
        value = key(item)
        return value is None, 0.0 if value is None else sign * value

    return sorted(items, key=order)


def _tokens(sample: GradedTrace) -> int:
    return len(sample.trace.token_ids)


def _largest_disagreement(group: Group) -> float | None:
    return max((found for sample in group.samples if (found := disagreement(sample)) is not None), default=None)


def mean_gap(inspected: InspectedGroup, place: int) -> float | None:
    """Return the mean distance of the trainer's log-probs from the sampler's over the tokens of a trace; None where
    unknown.
    """
    gap = inspected.gap(place)
    return None if gap is None or not len(gap) else float(np.abs(gap).mean())


def _largest_gap(inspected: InspectedGroup) -> float | None:
    gaps = (mean_gap(inspected, place) for place in range(len(inspected.group.samples)))
    return max((gap for gap in gaps if gap is not None), default=None)


_GROUP_KEYS: dict[SortKey, Callable[[InspectedGroup], float | None]] = {
    SortKey.SCORE: lambda inspected: group_mean_score(inspected.group),
    SortKey.SPREAD: lambda inspected: score_spread(inspected.group),
    SortKey.LENGTH: lambda inspected: mean_tokens(inspected.group),
    SortKey.DISAGREEMENT: lambda inspected: _largest_disagreement(inspected.group),
    SortKey.GAP: _largest_gap,
}
_TRACE_KEYS: dict[SortKey | None, Callable[[InspectedGroup, int], float | None]] = {
    SortKey.SCORE: lambda inspected, place: inspected.group.samples[place].score,
    SortKey.LENGTH: lambda inspected, place: _tokens(inspected.group.samples[place]),
    SortKey.DISAGREEMENT: lambda inspected, place: disagreement(inspected.group.samples[place]),
    SortKey.GAP: mean_gap,
}
