"""Run by test_fp8_syncs.py on four processes: what leaves several layouts for an FP8 server."""

from pathlib import Path

import torch
import torch.distributed as dist
from helpers.ranks import Ranks
from safetensors.torch import save_file

from exprl_megatron.config.policy import Layout, PolicyConfig
from exprl_megatron.policy.policy import Policy
from exprl_megatron.weight_sync.weight_exporter import WeightExporter

LAYOUTS = {"TP1": Layout(), "TP2": Layout(tp=2), "TP4": Layout(tp=4), "TP2xPP2": Layout(tp=2, pp=2)}


def leave(world, model: str, path: Path) -> None:
    """Writes what this rank would send, if anything."""
    policy = Policy(PolicyConfig(model=model, precision="bf16", layout=world.layout), seed=0)
    exporter = WeightExporter(policy.chunks, policy.architecture, world, 300_000, source_ranks=None, fp8=True)
    own: dict[str, torch.Tensor] = {}
    for number in range(len(exporter.rounds)):
        filled = exporter.gather(number)
        own |= {} if filled is None else {name: tensor.clone() for name, tensor in filled.named()}
    if own:
        save_file(own, path / f"{world.rank}.safetensors")
    dist.barrier()


ranks = Ranks()
for name, layout in LAYOUTS.items():
    (ranks.out / name).mkdir(exist_ok=True)
    ranks.within(layout, lambda w, n=name: leave(w, ranks.arguments["model"], ranks.out / n))
ranks.finish()
