"""Run by test_loaded_by_sglang.py with the servers' CPU backend: SGLang's model of each rank, built and loaded here.

No process group is made: a layer asks its group for a rank and a size alone. Nothing is computed, so that a model in
FP8 can be loaded too, which is for CUDA: what SGLang pads on a CPU alone is left out for it. What is written is which
tensors of SGLang's ranks differ from those of the project's rules on names.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from sglang.srt import runtime_context
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.update_config import adjust_config_with_unaligned_cpu_tp
from sglang.srt.layers.moe.utils import initialize_moe_config
from sglang.srt.model_loader.loader import _get_quantization_config, _initialize_model
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import prepare_server_args

from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.models.architecture import read_architecture
from exprl_megatron.models.fp8_blocks import SCALE, dequantize
from exprl_megatron.models.name_map import hf_shapes
from exprl_megatron.serving.loader import _compared
from exprl_megatron.serving.server_command import server_command
from exprl_megatron.serving.weight_layout import PLUS_ONE, server_parameters


def sglang_model(directory: Path, tp: int, rank: int) -> torch.nn.Module:
    """Return the model as a server's rank has it before it loads."""
    dtype = "bfloat16" if "quantization_config" in (directory / "config.json").read_text() else "float32"
    settings = {"dtype": dtype, "port": 1, "seed": 0, "weight_version": "v", "cuda": False}
    arguments = prepare_server_args(server_command(directory, ServerConfig(tp=tp), **settings)[3:])
    parallel = runtime_context.get_parallel()
    parallel.clear_stamp()
    ranks = runtime_context.SpawnRanks(world_rank=rank, gpu_id=0, dp_rank=None)
    runtime_context.publish(arguments, role="scheduler", ranks=ranks)
    for name in ("tp", "attn_tp", "moe_tp", "moe_ep", "moe_dp", "attn_cp", "pp"):
        parallel.override_permanently(**{f"{name}_group": _group(*((rank, tp) if name.endswith("tp") else (0, 1)))})
    initialize_moe_config()
    load = LoadConfig()
    config = ModelConfig.from_server_args(arguments)
    if dtype == "float32":
        config = adjust_config_with_unaligned_cpu_tp(config, load, tp)
    torch.set_default_dtype(config.dtype)
    try:
        return _initialize_model(config, load, _get_quantization_config(config, load))
    finally:
        torch.set_default_dtype(torch.float32)


def _group(rank: int, size: int) -> SimpleNamespace:
    ends = {"is_first_rank": rank == 0, "is_last_rank": rank == size - 1}
    return SimpleNamespace(rank_in_group=rank, world_size=size, cpu_group=None, device_group=None, **ends)


def loaded(directory: Path, tp: int, rank: int, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what a rank holds after SGLang's own loader filled it, FP8 blocks as the numbers that they stand for."""
    model = sglang_model(directory, tp, rank)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
        model.load_weights(list(weights.items()))
    held = _compared(model)
    return {
        name: _dequantized(tensor, held[name + SCALE]) if name + SCALE in held else tensor.detach()
        for name, tensor in held.items()
        if not name.endswith(SCALE)
    }


def _dequantized(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    whole = values.detach().reshape(-1, *values.shape[-2:])
    each = [dequantize(*pair) for pair in zip(whole, scales.detach().reshape(-1, *scales.shape[-2:]), strict=True)]
    return torch.stack(each).view(values.shape)


def by_rules(described: Path, tp: int, weights: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Return the same of each rank by the project's rules; `described`: a directory with the model's config in bf16."""
    architecture = read_architecture(described)
    shapes, found = hf_shapes(architecture), []
    settings = {"tp": tp, "kv_heads": architecture.kv_groups, "delta_net": architecture.delta_net}
    for server in server_parameters(shapes, server="cpu", **settings):
        made = {name: torch.full(shape, torch.nan) for name, shape in server.shapes.items()}
        grids = [tensor.view(-1, tensor.shape[-1] if tensor.dim() > 1 else 1) for tensor in made.values()]
        names, ours = list(shapes), list(made)
        for (of, *need), (to, *place) in zip(server.needs.tolist(), server.places.tolist(), strict=True):
            part = _cut(weights[names[of]].float().reshape(shapes[names[of]][0], -1), *need)
            _cut(grids[to], *place).copy_(part + 1 if ours[to].endswith(PLUS_ONE) else part)
        for to, *place in server.padding.tolist():
            _cut(grids[to], *place).zero_()
        found.append(made)
    return found


def _cut(grid: torch.Tensor, row: int, rows: int, column: int, columns: int) -> torch.Tensor:
    return grid[row : row + rows, column : column + columns]


def differences(directory: Path, described: Path, tp: int) -> list[str]:
    """Return what differs on any rank, by name. All numbers that are not in FP8 are such that bf16 has them."""
    stored: dict[str, torch.Tensor] = {}
    for path in directory.glob("*.safetensors"):
        stored |= load_file(path)
    scaled = {name for name in stored if name + SCALE in stored or name.endswith(SCALE)}
    stored = {name: tensor if name in scaled else tensor.bfloat16().float() for name, tensor in stored.items()}
    whole = {
        name: dequantize(tensor, stored[name + SCALE]) if name + SCALE in stored else tensor
        for name, tensor in stored.items()
    }
    found = set()
    for rank, ours in enumerate(by_rules(described, tp, whole)):
        held = loaded(directory, tp, rank, stored)
        found |= held.keys() ^ ours.keys()
        found |= {name for name in held.keys() & ours.keys() if not torch.equal(held[name].float(), ours[name])}
    return sorted(found)


def main() -> None:
    load_plugins()
    asked, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    found = {}
    for case, (directory, described, tp) in asked.items():
        try:
            found[case] = differences(Path(directory), Path(described), tp)
        except (AssertionError, ValueError) as error:
            found[case] = f"{type(error).__name__}: {error}"
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
