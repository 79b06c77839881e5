"""Run by test_converted_layouts.py on four processes: converted models loaded and checkpoints written, in layouts."""

from pathlib import Path

import torch.distributed as dist
from helpers.mbridge_witness import refill
from helpers.ranks import Ranks
from safetensors.torch import save_file

from exprl_megatron.config.policy import Layout, OptimizerConfig, PolicyConfig
from exprl_megatron.policy.checkpoint import save_checkpoint
from exprl_megatron.policy.policy import Policy

LAYOUTS = {
    "TP1": Layout(),
    "TP2xPP2+SP": Layout(tp=2, pp=2, sequence_parallel=True),
    "PP2xVPP2": Layout(pp=2, vpp=2),
}
EXPERTS = {
    "EP4": Layout(dp=4, ep=4),
    "TP2xPP2xEP2+SP": Layout(tp=2, pp=2, ep=2, sequence_parallel=True),
    "TP2xDP2xEP2xETP2+SP": Layout(tp=2, dp=2, ep=2, etp=2, sequence_parallel=True),
}
OF_FAMILY = {
    "llama": LAYOUTS,
    "qwen2": LAYOUTS,
    "qwen3": LAYOUTS,
    "qwen3-moe": {"PP2xVPP2": LAYOUTS["PP2xVPP2"], **EXPERTS},
    "mixtral": {"TP1": Layout(), **EXPERTS},
    "glm4-moe": {"PP2xVPP2": LAYOUTS["PP2xVPP2"], "TP2xPP2xEP2+SP": EXPERTS["TP2xPP2xEP2+SP"]},
    "olmo3": {"TP2xPP2+SP": LAYOUTS["TP2xPP2+SP"]},
}
NO_WITNESS = ("olmo3",)
"""Families that mbridge does not know."""


def load(converted: str, model: str, layout: Layout, out) -> list[str]:
    """Writes what the ranks loaded, and what mbridge does; the names in which their parameters differ."""
    policy = Policy(PolicyConfig(model=converted, layout=layout), seed=3)
    policy.save_huggingface(out)
    if policy.architecture.family in NO_WITNESS:
        return []
    differing, exported = refill(policy, Path(model))
    if policy.world.rank == 0:
        save_file(exported, out / "mbridge")
    everyones: list = [None] * layout.world_size
    dist.all_gather_object(everyones, differing)
    return [name for differs in everyones for name in differs]


def checkpoint(model: str, layout: Layout, out) -> None:
    """A run's checkpoint, and the weights that its policy would export."""
    policy = Policy(PolicyConfig(model=model, layout=layout, initialize="random"), seed=5)
    policy.begin_stage(OptimizerConfig(), total_steps=2, keep_ref_policy=True)
    save_checkpoint(out / "run" / "checkpoints", policy, {}, keep=1)
    policy.save_huggingface(out / "exported")


def main() -> None:
    ranks = Ranks()
    for family, model in ranks.arguments["models"].items():
        converted = ranks.arguments["converted"][family]
        for name, layout in OF_FAMILY[family].items():
            out = ranks.out / f"{family}-{name}"
            ranks.within(
                layout, lambda _, c=converted, m=model, la=layout, o=out: load(c, m, la, o), f"{family} {name}"
            )
        widest = list(OF_FAMILY[family].values())[-1]
        ranks.within(widest, lambda _, m=model, la=widest, o=ranks.out / family: checkpoint(m, la, o))
    ranks.finish()


if __name__ == "__main__":
    main()
