"""The stages that a config may list: of the built-in kinds, or of a class of the user's own over one of them."""

from typing import Annotated, Any, Literal, get_args

from pydantic import Discriminator, Field, Tag

from exprl_megatron.config.base import Config
from exprl_megatron.config.losses import LossConfig, SparseLossConfig
from exprl_megatron.config.plugin_path import PluginPath, is_plugin
from exprl_megatron.config.stages import ExprlOutcomeStage, ExprlProcessStage, SelfDistillStage, SftStage, SparseRlStage

Base = Literal["sparse-rl", "exprl-outcome", "exprl-process"]
CUSTOM_TAG = "custom "
"""Begins the tags of stages of the user's own."""


class CustomStageConfig(Config):
    """A stage of the user's own (docs/extending.md): a built-in one with other logic of sampling or learning."""

    kind: PluginPath
    """`module:Class`: the class of the stage, a subclass of `exprl_megatron.api.CustomStage`."""
    base: Base = "sparse-rl"
    """The built-in kind whose settings the stage has, by which traces are graded, and which does what the class leaves
    as it is."""
    objective: Literal["policy", "supervised"] = "policy"
    """What an update minimizes: the loss of `loss` over advantages, or the negative log-likelihood of the traces that
    `learn` returns (rejection-sampling fine-tuning)."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """The class is made with them."""

    @property
    def is_supervised(self) -> bool:
        """Whether an update is one of maximum likelihood."""
        return self.objective == "supervised"

    def violations(self, run_config) -> list[str]:
        # Those of the base, which comes after this class among the parents of each stage below.
        return super().violations(run_config) + custom_violations(self)


def custom_violations(stage: Any) -> list[str]:
    """Return the contradictions of a stage of the user's own beyond those of its base."""
    found = []
    if stage.is_supervised and stage.loss not in (LossConfig(), SparseLossConfig()):
        found.append(
            f"stage {stage.name}: objective is supervised, which has no ratio, KL term or bonus of `loss`; remove loss."
        )
    if stage.is_supervised and stage.max_staleness:
        found.append(
            f"stage {stage.name}: objective is supervised, which nothing corrects for traces of older weights; set "
            "max_staleness to 0."
        )
    return found


class CustomSparseRlStage(CustomStageConfig, SparseRlStage):
    """A stage of the user's own over `sparse-rl`."""

    kind: PluginPath  # type: ignore[assignment]
    base: Literal["sparse-rl"] = "sparse-rl"


class CustomExprlOutcomeStage(CustomStageConfig, ExprlOutcomeStage):
    """A stage of the user's own over `exprl-outcome`."""

    kind: PluginPath  # type: ignore[assignment]
    base: Literal["exprl-outcome"]


class CustomExprlProcessStage(CustomStageConfig, ExprlProcessStage):
    """A stage of the user's own over `exprl-process`."""

    kind: PluginPath  # type: ignore[assignment]
    base: Literal["exprl-process"]


BUILT_IN = (ExprlOutcomeStage, ExprlProcessStage, SparseRlStage, SelfDistillStage, SftStage)
CUSTOM = (CustomSparseRlStage, CustomExprlOutcomeStage, CustomExprlProcessStage)


def stage_tag(stage: Any) -> Any:
    """Return which member of AnyStage `stage` (a mapping or a config) is; its `kind` where it is none of them."""
    read = stage.get if isinstance(stage, dict) else lambda key, default=None: getattr(stage, key, default)
    kind = read("kind")
    return f"{CUSTOM_TAG}{read('base', 'sparse-rl')}" if isinstance(kind, str) and is_plugin(kind) else kind


def tag_of(config: type) -> str | None:
    """Return the tag of a class of AnyStage; None for any other class."""
    if config in CUSTOM:
        return f"{CUSTOM_TAG}{get_args(config.model_fields['base'].annotation)[0]}"
    return get_args(config.model_fields["kind"].annotation)[0] if config in BUILT_IN else None


AnyStage = Annotated[
    Annotated[ExprlOutcomeStage, Tag("exprl-outcome")]
    | Annotated[ExprlProcessStage, Tag("exprl-process")]
    | Annotated[SparseRlStage, Tag("sparse-rl")]
    | Annotated[SelfDistillStage, Tag("self-distill")]
    | Annotated[SftStage, Tag("sft")]
    | Annotated[CustomSparseRlStage, Tag("custom sparse-rl")]
    | Annotated[CustomExprlOutcomeStage, Tag("custom exprl-outcome")]
    | Annotated[CustomExprlProcessStage, Tag("custom exprl-process")],
    Discriminator(stage_tag),
]
