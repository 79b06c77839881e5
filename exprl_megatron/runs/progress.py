"""Where a run stands: what a checkpoint says of it beside the weights."""

from dataclasses import asdict, dataclass, replace


@dataclass(frozen=True)
class RunProgress:
    """A run's place: `step` steps of stage number `stage` are done; counters cover the whole run."""

    stage: int = 0
    step: int = 0
    updates: int = 0
    """Optimizer steps so far; names the weight version."""
    problems_drawn: int = 0
    """Place in the current stage's data."""
    traces: int = 0
    tokens: int = 0
    abstentions: int = 0
    first_gap: float | None = None
    """`sampler_gap/mean` of the first step that had one; later bounds go by it (training/log_prob_gap.py)."""

    @property
    def weight_version(self) -> str:
        """Name of the weights at this place; `updates_of` reads it."""
        return f"v{self.updates}"

    def after_stage(self) -> "RunProgress":
        """The place at the start of the next stage."""
        return replace(self, stage=self.stage + 1, step=0, problems_drawn=0)

    def as_record(self) -> dict:
        """For the checkpoint."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: dict) -> "RunProgress":
        """From the checkpoint."""
        return cls(**record)


def updates_of(weight_version: str) -> int:
    """The optimizer steps that the name of a weight version stands for."""
    return int(weight_version.removeprefix("v"))
