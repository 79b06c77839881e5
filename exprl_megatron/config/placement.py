"""Whether trainer and sampling servers share their devices."""

from typing import Literal

from pydantic import Field

from exprl_megatron.config.base import Config

COLOCATED_MEM_FRACTION = 0.75
"""Of a GPU for a colocated server's weights and cache. SGLang itself chooses 0.81 to 0.85 on GPUs of 80 GB and more,
for its own working memory; a trainer that sleeps beside it holds a context, communicators and a bucket."""


class PlacementConfig(Config):
    """Where the sampling servers are, as seen from the trainer. The judge's have devices of their own in any case."""

    kind: Literal["separate", "colocated"] = "separate"
    """`separate`: each has its devices (on a machine without any, processes side by side). `colocated`: they take turns
    on the same devices; the one sleeps, its memory in the host's or given up, while the other works."""
    max_asleep_gb: float | None = Field(None, gt=0)
    """With `colocated`: GiB of a device that the sleeping side may still hold; more stops the run. None: no bound."""

    def violations(self, whole) -> list[str]:
        if self.kind == "separate":
            return []
        found = []
        if whole.sync.transport in ("broadcast", "direct"):
            found.append(
                f"placement.kind is colocated, but sync.transport is {whole.sync.transport}, which has no group of two "
                f"processes on one GPU; set it to handles."
            )
        for stage in whole.stages:
            if getattr(stage, "max_staleness", 0):
                found.append(
                    f"placement.kind is colocated, but stage {stage.name} samples while it learns (max_staleness is "
                    f"{stage.max_staleness}); set that to 0, or kind to separate."
                )
            if stage.optimizer.offload:
                found.append(
                    f"placement.kind is colocated, which moves the whole optimizer between phases, but stage "
                    f"{stage.name} has optimizer.offload {stage.optimizer.offload:g}; set it to 0."
                )
        return found
