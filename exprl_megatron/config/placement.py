"""Whether trainer and sampling servers share their devices."""

from typing import Literal

from pydantic import Field

from exprl_megatron.config.base import Config

COLOCATED_MEM_FRACTION = 0.75
"""Fraction of a GPU for a colocated server's weights and KV cache. SGLang chooses 0.81 to 0.85 on GPUs of 80 GB and
more, for its own working memory; a sleeping trainer on the same GPU has a context, communicators and a bucket."""


class PlacementConfig(Config):
    """Where the sampling servers are, as seen from the trainer. The judge's have devices of their own in any case."""

    kind: Literal["separate", "colocated"] = "separate"
    """`separate`: each has its own devices (on a CPU, its own processes). `colocated`: they alternate
    on the same devices; one sleeps, with its memory offloaded to the host or released, while the other works."""
    max_asleep_gb: float | None = Field(None, gt=0)
    """With `colocated`: GiB of a device that the sleeping side may still hold; more stops the run. None: no bound."""

    def violations(self, run_config) -> list[str]:
        if self.kind == "separate":
            return []
        found = []
        if run_config.sync.transport in ("broadcast", "direct"):
            found.append(
                f"placement.kind is colocated, but sync.transport is {run_config.sync.transport}, which has no group "
                "of two processes on one GPU; set it to handles."
            )
        for stage in run_config.stages:
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
