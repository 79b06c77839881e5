"""Counting judgements that were not given, and stopping a run that has too many of them."""

from collections import Counter
from collections.abc import Iterable

from exprl_megatron.errors import RunStopped
from exprl_megatron.judging.judgement import Abstained, Judgement


def count_abstentions(judgements: Iterable[Judgement]) -> Counter[str]:
    """How often each reason for an abstention occurs."""
    return Counter(judgement.reason for judgement in judgements if isinstance(judgement, Abstained))


def check_abstention_rate(judgements: Iterable[Judgement], max_rate: float, where: str) -> None:
    """Raise RunStopped where more than `max_rate` (0..1) of a step's judgements are abstentions.

    `where` names the step in the message, for example "stage priming, step 3".
    """
    judgements = list(judgements)
    reasons = count_abstentions(judgements)
    abstained = reasons.total()
    if not judgements or abstained <= max_rate * len(judgements):
        return
    counts = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
    example = next(j for j in judgements if isinstance(j, Abstained) and j.reason == reasons.most_common(1)[0][0])
    said = " ".join(example.evidence.split())[:200]
    raise RunStopped(
        f"{where}: {abstained} of {len(judgements)} traces got no verdict ({counts}), more than "
        f"max_abstention_rate ({max_rate:g}) allows" + (f"; one of them: {said!r}." if said else ".")
    )
