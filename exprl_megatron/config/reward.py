"""The terms of a reward that is more than the judge's or the verifier's score."""

from typing import Annotated, Literal

from pydantic import Field

from exprl_megatron.config.base import Config
from exprl_megatron.config.plugin_path import PluginPath, choice_or_plugin

TermSource = Literal["judge", "verifier", "length"]
"""The judge's score, the answer verifier's, or the trace's tokens by `sampling.max_new_tokens`: each in [0, 1]."""


class RewardTermConfig(Config):
    """One term of a reward, which is the weighted sum of its terms (TRL's `reward_funcs` and `reward_weights`)."""

    term: Annotated[TermSource | PluginPath, choice_or_plugin(("judge", "verifier", "length"))]
    """`judge`, `verifier`, `length`, or a function of your own (problem, trace) -> float (docs/extending.md)."""
    weight: float = 1.0
    """Weight of the term; a negative one is a penalty."""
    name: str | None = Field(None, pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Name of the term in metrics and in the rollout log; None: the term's, or the function's."""

    @property
    def shown_name(self) -> str:
        """The name under which metrics and the rollout log have the term."""
        return self.name or self.term.rpartition(":")[2].rpartition(".")[2].lower()

    @property
    def is_custom(self) -> bool:
        """Whether a function of the user computes the term."""
        return self.term not in ("judge", "verifier", "length")


def reward_faults(stage: str, terms: tuple[RewardTermConfig, ...], judged: bool) -> list[str]:
    """Return a sentence for each contradiction in the reward of `stage`, which a judge grades where it is `judged`."""
    if not terms:
        return []
    sources, names = [term.term for term in terms], [term.shown_name for term in terms]
    found = [
        f"stage {stage}: reward has two terms named {name}; give one of them another name."
        for name in sorted({name for name in names if names.count(name) > 1})
    ]
    if judged and "judge" not in sources:
        found.append(
            f"stage {stage}: a judge grades its traces, but reward has no term judge; add it, or choose the kind "
            "sparse-rl."
        )
    if not judged and "judge" in sources:
        found.append(
            f"stage {stage}: reward has the term judge, but no judge grades a stage of the kind sparse-rl; choose the "
            "kind exprl-outcome."
        )
    return found
