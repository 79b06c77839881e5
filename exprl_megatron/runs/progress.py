"""Progress of a run: what a checkpoint contains in addition to the state of the policy."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from exprl_megatron.rollout.group import Group

CUSTOM_STAGE = "custom_stage"
"""The key of a checkpoint's record with the state of a stage of the user's own."""
_FORMER_CUSTOM_STAGE = "own_stage"
"""The same key in checkpoints of earlier versions."""


@dataclass(frozen=True)
class RunProgress:
    """Progress of a run: `step` steps of stage number `stage` are done; the counters cover the whole run."""

    stage: int = 0
    step: int = 0
    updates: int = 0
    """Optimizer steps so far; names the weight version."""
    prompts_consumed: int = 0
    """Position in the current stage's data."""
    traces: int = 0
    tokens: int = 0
    abstentions: int = 0
    first_gap: float | None = None
    """`sampler_gap/mean` of the first step that had one; later bounds go by it (training/log_prob_gap.py)."""

    @property
    def weight_version(self) -> str:
        """Name of the weights after these updates; `updates_of` is its inverse."""
        return f"v{self.updates}"

    def after_stage(self) -> "RunProgress":
        """Return the progress at the start of the next stage."""
        return replace(self, stage=self.stage + 1, step=0, prompts_consumed=0)

    def after_sampling(self, groups: Sequence[Group], prompts_consumed: int) -> "RunProgress":
        """Return the progress when a step has sampled `groups` of the next `prompts_consumed` problems."""
        samples = [sample for group in groups for sample in group.samples]
        return replace(
            self,
            prompts_consumed=self.prompts_consumed + prompts_consumed,
            traces=self.traces + len(samples),
            tokens=self.tokens + sum(len(sample.trace.token_ids) for sample in samples),
            abstentions=self.abstentions + sum(sample.reward is None for sample in samples),
        )

    def to_dict(self) -> dict:
        """Convert to plain values for a checkpoint, where `prompts_consumed` has the name `problems_drawn`."""
        record = asdict(self)
        return record | {"problems_drawn": record.pop("prompts_consumed")}

    @classmethod
    def from_dict(cls, record: dict) -> "RunProgress":
        """Read what to_dict wrote; the state of a stage of the user's own is a separate entry of a checkpoint."""
        others = record.keys() - {CUSTOM_STAGE, _FORMER_CUSTOM_STAGE}
        return cls(**{"prompts_consumed" if key == "problems_drawn" else key: record[key] for key in others})


def custom_stage_state(record: dict[str, Any]) -> dict[str, Any]:
    """Return the state of a stage of the user's own in a checkpoint's record; empty where the stage has none."""
    return record.get(CUSTOM_STAGE, record.get(_FORMER_CUSTOM_STAGE, {}))


def updates_of(weight_version: str) -> int:
    """Return the number of optimizer steps after which weights have the name `weight_version`."""
    return int(weight_version.removeprefix("v"))
