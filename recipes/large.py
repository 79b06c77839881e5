"""What the recipes from 32B on share: the paper's stages with larger steps and shorter answers.

A step is 128 problems with 16 traces of at most 4,096 tokens, which docs/scaling.md plans for; the paper's are a
quarter of that in number and four times as long. Stages see as many traces as the paper's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recipes.common import STAGE_2, Placed, Scale, at_scale, paper, pick
from recipes.trees import changed

_STEP = {"problems_per_step": 128, "group_size": 16, "updates_per_step": 1, "sampling": {"max_new_tokens": 4096}}
_LENGTHS = {"max_tokens": 8192, "micro_batch_tokens": 8192}
"""A prompt of up to 4,096 tokens with the longest answer; a micro-batch holds one such trace, or several shorter."""
_TEMPLATE_ARGS = {name: {"enable_thinking": False} for name in ("models/Qwen3-32B", "models/GLM-4.5-Air")}
"""Of models that think aloud unless they are instructed not to."""


@dataclass(frozen=True)
class LargeRuns:
    """The stages of one model at every number of nodes that it has layouts for."""

    name: str
    model: str
    """Directory in Hugging Face form."""
    judge: str
    precision: str
    judged: Mapping[int, Scale]
    """Layouts of stage 1."""
    unjudged: Mapping[int, Scale]
    """Layouts of stage 2 and the rivals, in which the judge's GPUs sample."""

    def prime(self, nodes: int) -> Placed:
        """Stage 1: ExpRL-Outcome, on-policy."""
        # 1,516 problems five times; the judge reads each trace once, behind a prefix that a group shares.
        tree = paper("qwen3-4b-outcome")
        tree["judge"] |= {"model": self.judge, "template_args": _TEMPLATE_ARGS.get(self.judge, {})}
        return self._placed("prime", tree, self.judged, nodes, {"steps": 60} | _STEP)

    def sparse(self, nodes: int) -> Placed:
        """Stage 2."""
        # As many traces as 500 steps of 512.
        return self._placed("sparse", paper(STAGE_2), self.unjudged, nodes, {"steps": 125} | _STEP)

    def tuned(self, nodes: int) -> Placed:
        """Fine-tuning on the references."""
        return self._placed("sft", paper("qwen3-4b-sft"), self.unjudged, nodes, {})

    def distilled(self, nodes: int) -> Placed:
        """Self-distillation."""
        return self._placed("self-distill", paper("qwen3-4b-self-distill"), self.unjudged, nodes, {"steps": 60} | _STEP)

    def _placed(
        self, directory: str, tree: dict, scales: Mapping[int, Scale], nodes: int, stage: Mapping[str, Any]
    ) -> Placed:
        tree = changed(tree, prompt={"template_args": _TEMPLATE_ARGS.get(self.model, {})})
        policy = _LENGTHS | {"model": self.model, "precision": self.precision}
        return at_scale(tree, pick(self.name, scales, nodes), f"runs/{self.name}/{directory}", stage, **policy)
