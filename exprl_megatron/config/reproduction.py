"""`reproduce: released`: every setting by which a run does what the released ExpRL code does.

The key sets what the config leaves open. A value that the config gives itself takes precedence, and each one that is
another than the released is reported (`deviations`). Some values exist for this key alone (`ONLY_RELEASED`): a config
without the key that has one of them is refused.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

OUTCOME, PROCESS, SPARSE = "exprl-outcome", "exprl-process", "sparse-rl"
EVERY_KIND = (OUTCOME, PROCESS, SPARSE, "self-distill", "sft")
FIRST, SECOND = "stage 1", "stage 2"
"""The two programs that were released: verl for the first stage and its baselines, PipelineRL for the second."""


@dataclass(frozen=True)
class Released:
    """A setting of the released code, and its place in that code (repository violetxi/ExpRL, dde1f7c)."""

    key: str
    """Dotted, within a stage where there are `kinds`."""
    value: Any
    source: str
    kinds: tuple[str, ...] = ()
    """Kinds of the stages that have the setting; empty: it belongs to the run."""
    program: str | None = None
    """FIRST or SECOND, where only that program has the value."""


_GENRM = "stage1_verl/verl/trainer/ppo/ray_trainer_genrm.py"
_PROMPTS = "stage1_verl/verl/utils/prompt_templates/math_likelihood_judge.py"
_ACTOR = "stage1_verl/verl/workers/actor/dp_actor.py"
_PIPELINE = "stage2_pipeline_rl"

RELEASED = (
    # The judge.
    Released("judge.parser", "released", f"{_GENRM}:1166 (first `Score:`, first character)"),
    Released("judge.prompt_order", "upstream", f"{_PROMPTS} (the reference is last)"),
    Released("judge.reasks", 0, f"{_GENRM}:1166 (a score that cannot be read is None at once)"),
    # What is judged, and what a score is worth.
    Released("granularity", "segment", f"{_GENRM}:1275 (each step without the earlier ones)", (PROCESS,)),
    Released("segments.splitter", "released", f"{_GENRM}:1252 (_find_step_spans)", (PROCESS,)),
    Released("segments.min_tokens", 0, f"{_GENRM}:1252 (no minimum)", (PROCESS,)),
    Released("segments.max_segments", None, f"{_GENRM}:1252 (no cap)", (PROCESS,)),
    Released("variant", "code", "stage1_verl/verl/trainer/ppo/core_algos.py (advantages)", (OUTCOME, PROCESS)),
    Released("verifier.variant", "prime", "stage1_verl/verl/utils/reward_score/__init__.py:108", (), FIRST),
    Released("verifier.variant", "code", f"{_PIPELINE}/pipelinerl/domains/math/verifier_api.py:106", (), SECOND),
    # The loss.
    Released("loss.aggregation", "micro-batch-mean", f"{_ACTOR}:475", (OUTCOME, PROCESS)),
    Released("loss.aggregation", "micro-batch-mean", f"{_ACTOR}:475", (SPARSE,), FIRST),
    Released(
        "loss.use_rollout_log_probs",
        True,
        f"{_PIPELINE}/pipelinerl/finetune/rl/__init__.py:234 (old_logprobs are the sampler's)",
        (SPARSE,),
        SECOND,
    ),
    Released("sync.pause_mode", "in_place", f"{_PIPELINE}/pipelinerl/vllm0.py:154 (the cache is kept)", (), SECOND),
    # The optimizer: torch's AdamW over all parameters; in stage 2 `no_decay` names no parameter of Qwen3.
    Released(
        "optimizer.decay_norms_and_biases",
        True,
        f"stage1_verl/verl/workers/fsdp_workers.py:430, {_PIPELINE}/pipelinerl/finetune/optim.py:11",
        EVERY_KIND,
    ),
    Released(
        "optimizer.warmup_from_zero",
        True,
        "stage1_verl/verl/utils/torch_functional.py (get_cosine_schedule_with_warmup)",
        EVERY_KIND,
    ),
)

ONLY_RELEASED: dict[str, tuple[Any, ...]] = {
    "judge.parser": ("released",),
    "judge.prompt_order": ("upstream",),
    "verifier.variant": ("prime", "code"),
    "stages.segments.splitter": ("released",),
    "stages.loss.aggregation": ("micro-batch-mean",),
    "stages.aggregation": ("micro-batch-mean",),
}
"""Values that no config has without the key; a stage's number is left out."""


def expand_reproduction(tree: Any) -> tuple[Any, list[str]]:
    """Return `tree` (plain dicts and lists) with the released settings where `reproduce` asks for them; what is wrong
    with it.

    The key stays: the resolved config says that it was given.
    """
    if not isinstance(tree, dict) or tree.get("reproduce") != "released":
        return tree, []
    if _programs(tree) == {FIRST, SECOND} and "variant" not in (tree.get("verifier") or {}):
        return tree, [
            "reproduce is released, but the released code verifies the answers of its first stage (GRPO) and of its "
            "second in different ways, and the config has a sparse-rl stage of each; make them two runs."
        ]
    for path, released in _settings(tree):
        tree = _with_default(tree, path, released.value)
    return tree, []


def deviations(tree: Any) -> list[str]:
    """Return one sentence for each value of a resolved config (plain dicts and lists) that is not the released one."""
    if tree.get("reproduce") != "released":
        return []
    return [
        f"reproduce is released, but {'.'.join(map(str, path))} is {_shown(found)} where the released code has "
        f"{_shown(released.value)}: the config's own value is used."
        for path, released in _settings(tree)
        if (found := _value(tree, path)) != released.value
    ]


def released_only_values(tree: Any) -> list[str]:
    """Return one sentence for each value of a resolved config that only `reproduce: released` may have set."""
    if tree.get("reproduce") is not None:
        return []
    return [
        f"{'.'.join(map(str, path))} is {_shown(value)}, which reproduces one part of the released code without the "
        "others; set reproduce to released, or leave the key out."
        for path, value in _leaves(tree)
        if value in ONLY_RELEASED.get(".".join(str(part) for part in path if not isinstance(part, int)), ())
    ]


def _settings(tree: dict) -> Iterator[tuple[tuple[str | int, ...], Released]]:
    """Yield the released settings that a config has a place for, each with its path."""
    program = SECOND if SECOND in _programs(tree) else FIRST
    for released in RELEASED:
        section, *_ = path = tuple(released.key.split("."))
        if not released.kinds and released.program in (None, program) and (section != "judge" or tree.get("judge")):
            yield path, released
        for number, stage in enumerate(_stages(tree)):
            if stage.get("kind") in released.kinds and released.program in (None, _program(stage)):
                yield ("stages", number, *path), released


def _stages(tree: dict) -> list[dict]:
    stages = tree.get("stages")
    return [stage if isinstance(stage, dict) else {} for stage in (stages if isinstance(stages, list) else ())]


def _programs(tree: dict) -> set[str]:
    """Return the programs of the sparse-reward stages."""
    return {_program(stage) for stage in _stages(tree) if stage.get("kind") == SPARSE}


def _program(stage: dict) -> str:
    """Return the program of a stage: of sparse-reward stages GRPO alone, which divides by the std, is the first's."""
    return SECOND if stage.get("kind") == SPARSE and stage.get("advantage") != "group-normalized" else FIRST


def _with_default(tree: Any, path: tuple[str | int, ...], value: Any) -> Any:
    """Return a copy of `tree` that has `value` at `path` where there is none; what is no mapping on the way stays as it
    is.
    """
    first, *rest = path
    if isinstance(tree, list):
        return [_with_default(item, tuple(rest), value) if i == first else item for i, item in enumerate(tree)]
    if not isinstance(tree, dict):
        return tree
    if not rest:
        return {first: value} | tree
    return tree | {first: _with_default(tree.get(first, {}), tuple(rest), value)}


def _value(tree: Any, path: tuple[str | int, ...]) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def _leaves(tree: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in items:
            yield from _leaves(value, (*path, key))
    else:
        yield path, tree


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
