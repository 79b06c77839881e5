"""What all models' recipes are made of: a stage of the paper at a model's scale, and the factories of one model."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import nemo_run as run

from exprl_megatron.errors import UserError
from recipes import entrypoints
from recipes.places import Nodes, Site
from recipes.trees import as_config, changed, written


@dataclass(frozen=True)
class Servers:
    """SGLang servers of one kind."""

    count: int
    tp: int = 1


@dataclass(frozen=True)
class Scale:
    """A stage on a given number of machines."""

    nodes: Nodes
    layout: Mapping[str, int | bool]
    """Of the trainer, as in policy.layout; only what is not 1."""
    policy: Servers
    judge: Servers | None = None
    recompute: str = "none"
    colocated: bool = False
    """Trainer and sampling servers take turns on the same GPUs."""


@dataclass(frozen=True)
class Placed:
    """A run's config and its nodes."""

    nodes: Nodes
    config: dict


STAGE_2 = "qwen3-4b-stage2-synchronous"
_MICRO_BATCH_TOKENS = 24576

Stage = Callable[[int], Placed]
"""A stage on that many nodes in all."""


def pick(name: str, scales: Mapping[int, Scale], nodes: int) -> Scale:
    """Return the scale for this number of nodes; UserError where the recipe has none."""
    if nodes not in scales:
        known = ", ".join(map(str, sorted(scales)))
        raise UserError(
            f"{name} has layouts for {known} nodes, not for {nodes}; take one of these, or set layout, servers and "
            "nodes of its config yourself (`exprl plan` finds them)."
        )
    return scales[nodes]


def at_scale(tree: dict, scale: Scale, directory: str, stage: Mapping[str, Any], **policy: Any) -> Placed:
    """`tree`, a run of one stage, in `directory` at `scale`, with changes to its stage and its policy.

    Held-out problems are sampled for as many tokens as the stage's; a stage without a judge has none.
    """
    (before,) = tree["stages"]
    after = changed(before, **stage)
    layout = dict(scale.layout) | ({"sequence_parallel": True} if scale.layout.get("tp", 1) > 1 else {})
    tree = tree | {"directory": directory, "stages": [after], "judge": tree["judge"] if scale.judge else None}
    tree = tree | {"policy": tree["policy"] | {"layout": layout, "recompute": scale.recompute} | policy}
    tree = changed(tree, server={"count": scale.policy.count, "tp": scale.policy.tp})
    if scale.colocated:
        tree = changed(tree, placement={"kind": "colocated"})
    if scale.judge:
        tree = changed(tree, judge={"server": {"count": scale.judge.count, "tp": scale.judge.tp}})
    if "sampling" in after and tree["evaluation"] is not None:
        sampling = {"max_new_tokens": after["sampling"]["max_new_tokens"]}
        tree = changed(tree, evaluation={"sampling": sampling})
    return Placed(scale.nodes, tree)


def paper(name: str) -> dict:
    """Return the paper's run of that name (configs/paper), in the form that this project recommends, not the released
    one.

    Only the released loss depends on the tokens of a micro-batch. A recipe's has room for the longest trace, where the
    released size would need recomputation.
    """
    tree = written(f"paper/{name}", "reproduce=null")
    if tree["policy"]["max_tokens"] <= _MICRO_BATCH_TOKENS:
        tree = changed(tree, policy={"micro_batch_tokens": _MICRO_BATCH_TOKENS})
    return tree


def factories(name: str, nodes: int, prime: Stage, sparse: Stage, sft: Stage, self_distill: Stage) -> tuple:
    """Return the factories `exprl`, `sparse_rl`, `sft`, `self_distill` and `exprl_then_sparse_rl` of the model `name`.

    Each takes the number of nodes, by default `nodes`: `--factory "NAME(nodes=16)"`.
    """
    default = nodes

    def single(entrypoint: Callable, stage: Stage) -> Callable:
        @run.cli.factory(target=entrypoint, name=name)
        def factory(nodes: int = default) -> run.Partial:
            placed = stage(nodes)
            config, site = as_config(placed.config, name), run.Config(Site)
            return run.Partial(entrypoint, config=config, nodes=_config(placed.nodes), site=site)

        return factory

    @run.cli.factory(target=entrypoints.exprl_then_sparse_rl, name=name)
    def both(nodes: int = default) -> run.Partial:
        first, second = prime(nodes), sparse(nodes)
        return run.Partial(
            entrypoints.exprl_then_sparse_rl,
            prime=as_config(first.config, name),
            sparse=as_config(second.config, name),
            prime_nodes=_config(first.nodes),
            sparse_nodes=_config(second.nodes),
            site=run.Config(Site),
        )

    singles = zip(entrypoints.SINGLE, (prime, sparse, sft, self_distill), strict=True)
    return (*(single(entrypoint, stage) for entrypoint, stage in singles), both)


def _config(nodes: Nodes) -> run.Config[Nodes]:
    return run.Config(Nodes, **asdict(nodes))
