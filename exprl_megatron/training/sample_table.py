"""A few traces of a step for trackers: the policy's text and its scores.

References, judge prompts and the judge's answers are not included, since a tracker may be an external service.
"""

from collections.abc import Callable, Sequence

from exprl_megatron.judging.judgement import Abstained, Judgement
from exprl_megatron.reporting.trackers import SampleTable
from exprl_megatron.rollout.group import GradedTrace, Group

COLUMNS = ("problem_id", "sample", "problem", "trace", "score", "verifier", "tokens", "finish")
_MAX_CHARS = 4_000
"""Number of characters of a problem or a trace in the table."""


def sample_table(stage: str, groups: Sequence[Group], problem_of: Callable[[str], str], count: int) -> SampleTable:
    """Return `count` traces of evenly spaced groups, alternately the best and the worst of a group.

    `problem_of` returns the text of a problem for its id.
    """
    chosen = [groups[i * len(groups) // count] for i in range(count)] if len(groups) > count else list(groups)
    rows = [_row(group, _extreme(group, best=place % 2 == 0), problem_of) for place, group in enumerate(chosen)]
    return SampleTable(f"{stage}/traces", COLUMNS, tuple(rows))


def _extreme(group: Group, best: bool) -> GradedTrace:
    scored = [sample for sample in group.samples if sample.score is not None] or list(group.samples)
    return (max if best else min)(scored, key=lambda sample: sample.score or 0.0)


def _row(group: Group, sample: GradedTrace, problem_of: Callable[[str], str]) -> tuple[str | float | None, ...]:
    return (
        group.problem_id,
        float(sample.trace.sample),
        problem_of(group.problem_id)[:_MAX_CHARS],
        sample.trace.text[:_MAX_CHARS],
        sample.score,
        _finding(sample.verified),
        float(len(sample.trace.token_ids)),
        sample.trace.finish_reason,
    )


def _finding(judgement: Judgement | None) -> str:
    if judgement is None:
        return ""
    if isinstance(judgement, Abstained):
        return f"abstained: {judgement.reason}"
    return "right" if judgement.value == 1.0 else "wrong"
