"""`build_recipes.py PRECISION FILE MODEL...`: builds recipes' models in one precision, for every rank, on meta tensors.

Writes as JSON what the tests ask of each: how many ranks were built, and all that is not as it should be.
"""

import gc
import json
import sys
import time
from collections import defaultdict
from math import prod
from pathlib import Path

import torch
from fake_cuda import pretend_gpu
from helpers.recipe_layouts import ON_TE

PRECISION, FILE = sys.argv[1], Path(sys.argv[2])
pretend_gpu((10, 0) if PRECISION == "mxfp8" else (9, 0))

from helpers.meta import meta_chunks, pretend_world  # noqa: E402
from megatron.core import fp8_utils  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.ssm.gated_delta_net.gdn import GatedDeltaNet  # noqa: E402
from transformer_engine.pytorch.quantization import FP8GlobalStateManager  # noqa: E402

from exprl_megatron import planning  # noqa: E402
from exprl_megatron.config.policy import PolicyConfig  # noqa: E402
from exprl_megatron.config.precision import PrecisionConfig  # noqa: E402
from exprl_megatron.models.architecture import (  # noqa: E402
    Architecture,
    layout_violations,
    padded_vocabulary,
    read_architecture,
)
from exprl_megatron.models.name_map import HEAD, embedding, hf_shapes, is_buffer, parameters  # noqa: E402
from exprl_megatron.models.rules import Rule, spans  # noqa: E402
from exprl_megatron.models.stored_parameters import stored_parameters  # noqa: E402
from exprl_megatron.policy.gated_delta_net import Fp32DecayNet, PlainRMSNorm  # noqa: E402
from exprl_megatron.policy.named_weights import named_weights  # noqa: E402

Shapes = dict[tuple[int, str], tuple[int, ...]]
BF16_LAYERS = 0 if PRECISION in ("bf16", "fp8-delayed") else 1


def main() -> None:
    # Every world that is left collects garbage: none is among what was imported.
    gc.freeze()
    found = {name: build_all(name) for name in sys.argv[3:]}
    FILE.write_text(json.dumps(found), encoding="utf-8")


def build_all(name: str) -> dict:
    began = time.monotonic()
    architecture = read_architecture(Path(planning.__file__).parent / "architectures" / name)
    precision = PrecisionConfig(kind=PRECISION, first_last_bf16=BF16_LAYERS)
    config = PolicyConfig(model="none", precision=precision, layout=ON_TE[name])
    wrong = layout_violations(architecture, config.layout)
    shards: dict[str, dict] = defaultdict(dict)
    table = by_the_table(architecture, config)
    contexts, built = None, 0
    for rank in range(config.layout.world_size):
        with pretend_world(config.layout, rank) as world:
            if world.cp_rank or (world.dp_rank and not architecture.experts):
                continue
            chunks = meta_chunks(architecture, config, world)
            wrong += [f"rank {rank}: {sentence}" for sentence in check(chunks, table[world.pp_rank, world.ep_rank])]
            collect_shards(chunks, shards)
            contexts = contexts or look_at_contexts(chunks[0])
            built += 1
    wrong += untiled(shards) + unconverted(shards, architecture)
    return {
        "built": built,
        "ranks": config.layout.world_size,
        "wrong": wrong[:20],
        "contexts": contexts,
        "seconds": round(time.monotonic() - began, 1),
    }


def by_the_table(architecture: Architecture, config: PolicyConfig) -> dict[tuple[int, int], Shapes]:
    """Names and shapes of the parameters of each (pipeline, expert-parallel) rank, from the Hugging Face shapes."""
    layout, shapes = config.layout, hf_shapes(architecture)
    for name in {embedding(architecture), HEAD} & shapes.keys():
        shapes[name] = (padded_vocabulary(architecture, layout.tp), architecture.hidden)
    found: dict[tuple[int, int], Shapes] = defaultdict(dict)
    for entry in parameters(architecture, layout, grouped=True):
        ranks = layout.tp if entry.ep_rank is None else layout.etp
        whole = [torch.empty(shapes[name], device="meta") for name in entry.hf_names]
        parts = [first_part(entry.rule, number, tensor, ranks) for number, tensor in enumerate(whole)]
        shape = tuple(entry.rule.merge(parts).shape)
        for ep_rank in range(layout.ep) if entry.ep_rank is None else [entry.ep_rank]:
            found[entry.pp_rank, ep_rank][entry.chunk, entry.name] = shape
    return found


def first_part(rule: Rule, number: int, tensor: torch.Tensor, ranks: int) -> torch.Tensor:
    """What the first of `ranks` has of the rule's tensor."""
    dim = rule.split_dim
    if dim is None:
        return tensor
    cuts = spans(rule, number, tensor.shape[dim], 0, ranks)
    return torch.cat([tensor.narrow(dim, begin, end - begin) for begin, end in cuts], dim)


def check(chunks: list[GPTModel], expected: Shapes) -> list[str]:
    wrong = []
    found = {(i, name): weight for i, chunk in enumerate(chunks) for name, weight in named_weights(chunk)}
    if {place: tuple(parameter.shape) for place, parameter in found.items()} != expected:
        wrong.append(f"names or shapes differ from the table's: {sorted(expected.keys() ^ found.keys())[:4]}")
    if {parameter.device.type for parameter in found.values()} != {"meta"}:
        wrong.append("a parameter is not on the meta device")
    if {weight.dtype for (_, name), weight in found.items() if not is_kept(name)} != {torch.bfloat16}:
        wrong.append("a parameter is not nominally bf16")
    if not {weight.dtype for (_, name), weight in found.items() if is_kept(name)} <= {torch.float32}:
        wrong.append("a buffer or a decay rate is not in fp32")
    for layer in (layer for chunk in chunks for layer in chunk.decoder.layers):
        mlp = layer.mlp.experts if hasattr(layer.mlp, "experts") else layer.mlp
        attention = layer.self_attention
        modules = (mlp.linear_fc1, mlp.linear_fc2)
        if isinstance(attention, GatedDeltaNet):
            modules += (attention.in_proj, attention.out_proj)
            if (type(attention), type(attention.out_norm)) != (Fp32DecayNet, PlainRMSNorm):
                wrong.append(f"layer {layer.layer_number} is another gated delta net than it should be")
        else:
            modules += (attention.linear_qkv, attention.linear_proj, attention.core_attention)
        if (shared := getattr(layer.mlp, "shared_experts", None)) is not None:
            modules += (shared.linear_fc1, shared.linear_fc2)
        if not all(type(module).__name__.startswith("TE") for module in modules):
            wrong.append(f"layer {layer.layer_number} has modules that are not Transformer Engine's")
    for index, chunk in enumerate(chunks):
        covered = {name for name, value in sharded(chunk).items()}
        missing = {name for name, _ in named_weights(chunk)} - covered
        if missing:
            wrong.append(f"the sharded state dict of chunk {index} lacks {sorted(missing)[:4]}")
    return wrong


def is_kept(name: str) -> bool:
    """Whether what Megatron calls `name` is in fp32 in every precision."""
    return is_buffer(name) or name.endswith(".A_log")


def sharded(chunk: GPTModel) -> dict[str, ShardedTensor | ShardedTensorFactory]:
    """Of the chunk's sharded state dict the tensors, without Transformer Engine's extra states."""
    state = chunk.sharded_state_dict()
    return {name: value for name, value in state.items() if isinstance(value, ShardedTensor | ShardedTensorFactory)}


def collect_shards(chunks: list[GPTModel], shards: dict[str, dict]) -> None:
    """Adds, for every key of the checkpoint, where this rank's parts lie: {offset: (shape, global shape)}."""
    for chunk in chunks:
        for value in sharded(chunk).values():
            parts = value.build() if isinstance(value, ShardedTensorFactory) else [value]
            for part in parts if isinstance(parts, list) else parts.values():
                prepended = part.prepend_axis_num
                shape = (1,) * prepended + tuple(part.local_shape)
                shards[part.key][tuple(part.global_offset)] = (shape, tuple(part.global_shape))


def untiled(shards: dict[str, dict]) -> list[str]:
    """Keys whose parts, of all ranks together, are not the whole tensor."""
    wrong = []
    for key, parts in shards.items():
        (whole,) = {whole for _, whole in parts.values()}
        if sum(prod(shape) for shape, _ in parts.values()) != prod(whole):
            wrong.append(f"the ranks' shards of {key} do not make up {whole}")
    return wrong


def unconverted(shards: dict[str, dict], architecture: Architecture) -> list[str]:
    """Keys that a converted model's files lack or have for nothing."""
    written = {tensor.key for stored in stored_parameters(architecture) for tensor in stored.tensors}
    return [f"{key} is not both asked for and converted" for key in sorted(shards.keys() ^ written)]


def look_at_contexts(chunk: GPTModel) -> dict:
    """The recipe that Megatron makes of the config, and in which layers it is in force."""
    config = chunk.config
    if not config.fp8:
        return {"recipe": None, "in_force": {}}
    recipe = fp8_utils.get_fp8_recipe(config)
    in_force = {}
    for layer in (0, config.num_layers // 2, config.num_layers - 1):
        with fp8_utils.get_fp8_context(config, layer):
            in_force[layer] = FP8GlobalStateManager.is_fp8_enabled()
            if in_force[layer] and type(FP8GlobalStateManager.get_fp8_recipe()) is not type(recipe):
                in_force[layer] = type(FP8GlobalStateManager.get_fp8_recipe()).__name__
    fields = {name: str(value) for name, value in vars(recipe).items()}
    kinds = ("delayed", "float8_current_scaling", "float8_block_scaling", "mxfp8")
    return {
        "recipe": type(recipe).__name__,
        "is": [kind for kind in kinds if getattr(recipe, kind)()],
        "format": recipe.fp8_format.name,
        "fields": fields,
        "in_force": in_force,
    }


if __name__ == "__main__":
    main()
