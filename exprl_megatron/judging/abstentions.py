"""Counts abstentions, and stops a run that has too many of them."""

from collections import Counter, deque
from collections.abc import Iterable, Sequence

from exprl_megatron.errors import RunStopped
from exprl_megatron.judging.judgement import Abstained, Judgement


class AbstentionWindow:
    """Watches the share of abstentions among the last `size` judgements, across steps."""

    def __init__(self, max_rate: float, size: int):
        """`max_rate` is in [0, 1]."""
        self._max_rate = max_rate
        self._last: deque[Judgement] = deque(maxlen=size)

    def add(self, judgements: Iterable[Judgement], where: str) -> None:
        """Add a step's judgements to the window, and check its share of abstentions.

        Args:
            judgements: the judgements of one step.
            where: the step's name in the message, for example "stage priming, step 3".

        Raises:
            RunStopped: more than `max_rate` of the window are abstentions. A window that is not full is checked too.
        """
        self._last.extend(judgements)
        check_abstention_rate(self._last, self._max_rate, where)


def count_abstentions(judgements: Iterable[Judgement]) -> Counter[str]:
    """Count the abstentions by reason."""
    return Counter(judgement.reason for judgement in judgements if isinstance(judgement, Abstained))


def check_abstention_rate(judgements: Sequence[Judgement], max_rate: float, where: str) -> None:
    """Check the share of abstentions; `max_rate` is in [0, 1], and `where` names the step in the message.

    Raises:
        RunStopped: more than `max_rate` of the judgements are abstentions.
    """
    reasons = count_abstentions(judgements)
    abstained = reasons.total()
    if abstained <= max_rate * len(judgements):
        return
    counts = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
    commonest = reasons.most_common(1)[0][0]
    example = next(j.evidence for j in judgements if isinstance(j, Abstained) and j.reason == commonest)
    evidence = " ".join(example.split())[:200]
    raise RunStopped(
        f"{where}: of the last {len(judgements)} judgements {abstained} are abstentions ({counts}), more than "
        f"max_abstention_rate ({max_rate:g}) allows"
        + (f"; one of them ({commonest}): {evidence!r}." if evidence else ".")
    )
