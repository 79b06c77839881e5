"""The table of names: which Hugging Face tensors make up which Megatron parameter, on which rank, and how.

Loading, export and every weight transport read this one table. It is pure: no process group, no Megatron.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from exprl_megatron.config.policy import Layout
from exprl_megatron.policy.architecture import Architecture

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Rule:
    """How a Megatron parameter is made of Hugging Face tensors: here, one tensor, the same on every rank.

    `split_dim` is the dimension of the Hugging Face tensors that tensor parallelism cuts into equal parts
    (None: not cut); every rank merges its parts into its parameter.
    """

    split_dim: int | None = None

    def merge(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """One rank's parts of the Hugging Face tensors -> that rank's Megatron parameter."""
        return parts[0]

    def parts(self, parameter: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The inverse of merge."""
        return (parameter,)

    def join(self, shards: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The Megatron parameters of all tensor-parallel ranks, in their order -> the full Hugging Face tensors."""
        if self.split_dim is None:
            return self.parts(shards[0])
        by_tensor = zip(*(self.parts(shard) for shard in shards), strict=True)
        return tuple(torch.cat(parts, dim=self.split_dim) for parts in by_tensor)


@dataclass(frozen=True)
class GateUp(Rule):
    """SwiGLU's two matrices, each cut by rows, gate above up."""

    split_dim: int = 0

    def merge(self, parts):
        return torch.cat(tuple(parts))

    def parts(self, parameter):
        return parameter.chunk(2)


@dataclass(frozen=True)
class QueryKeyValue(Rule):
    """Query, key and value, cut by rows; in Megatron each KV group's queries, key and value lie together."""

    split_dim: int = 0
    heads_per_group: int = 1
    head_dim: int = 1

    def merge(self, parts):
        query, key, value = parts
        groups = key.shape[0] // self.head_dim
        grouped = [part.reshape(groups, -1, *part.shape[1:]) for part in (query, key, value)]
        return torch.cat(grouped, dim=1).flatten(0, 1)

    def parts(self, parameter):
        rows = (self.heads_per_group * self.head_dim, self.head_dim, self.head_dim)
        grouped = parameter.reshape(-1, sum(rows), *parameter.shape[1:])
        return tuple(part.flatten(0, 1) for part in grouped.split(rows, dim=1))


@dataclass(frozen=True)
class Vocabulary(Rule):
    """An embedding or output layer, cut by rows after its rows were padded with zeros to fit."""

    split_dim: int = 0
    rows: int = 0
    """Rows without padding."""

    def join(self, shards):
        return (torch.cat(tuple(shards))[: self.rows],)


@dataclass(frozen=True)
class Parameter:
    """One Megatron parameter: where it lives, what it is called there, and what it is made of."""

    pp_rank: int
    chunk: int
    """Virtual pipeline stage on that rank."""
    name: str
    """Within the chunk: layers are counted from the chunk's first."""
    hf_names: tuple[str, ...]
    rule: Rule
    exported: bool = True
    """False for the last stage's copy of a tied embedding."""


def parameters(architecture: Architecture, layout: Layout) -> list[Parameter]:
    """All Megatron parameters of all pipeline stages, from the embedding to the output layer."""
    last = (layout.pp - 1, layout.vpp - 1)
    vocabulary = Vocabulary(rows=architecture.vocabulary)
    table = [Parameter(0, 0, "embedding.word_embeddings.weight", (EMBEDDING,), vocabulary)]
    layers_per_stage = architecture.layers // (layout.pp * layout.vpp)
    for layer in range(architecture.layers):
        stage, local = divmod(layer, layers_per_stage)
        chunk, pp_rank = divmod(stage, layout.pp)
        for name, hf_names, rule in _layer(architecture):
            hf_full = tuple(f"model.layers.{layer}.{hf_name}" for hf_name in hf_names)
            table.append(Parameter(pp_rank, chunk, f"decoder.layers.{local}.{name}", hf_full, rule))
    table.append(Parameter(*last, "decoder.final_layernorm.weight", ("model.norm.weight",), Rule()))
    if not architecture.tied:
        table.append(Parameter(*last, "output_layer.weight", (HEAD,), vocabulary))
    elif layout.pp > 1:
        table.append(Parameter(*last, "output_layer.weight", (EMBEDDING,), vocabulary, exported=False))
    return table


def hf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model in Hugging Face form, in the order of export."""
    hidden, ffn = architecture.hidden, architecture.ffn
    query, key = architecture.heads * architecture.head_dim, architecture.kv_groups * architecture.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key, hidden),
        "self_attn.v_proj.weight": (key, hidden),
        "self_attn.q_proj.bias": (query,),
        "self_attn.k_proj.bias": (key,),
        "self_attn.v_proj.bias": (key,),
        "self_attn.q_norm.weight": (architecture.head_dim,),
        "self_attn.k_norm.weight": (architecture.head_dim,),
        "self_attn.o_proj.weight": (hidden, query),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
    present = [hf_name for _, hf_names, _ in _layer(architecture) for hf_name in hf_names]
    shapes = {EMBEDDING: (architecture.vocabulary, hidden)}
    for index in range(architecture.layers):
        shapes |= {f"model.layers.{index}.{name}": layer[name] for name in present}
    shapes["model.norm.weight"] = (hidden,)
    if not architecture.tied:
        shapes[HEAD] = (architecture.vocabulary, hidden)
    return shapes


def _layer(architecture: Architecture) -> list[tuple[str, tuple[str, ...], Rule]]:
    """One layer's parameters: Megatron name, Hugging Face names, rule."""
    heads_per_group = architecture.heads // architecture.kv_groups
    qkv = QueryKeyValue(heads_per_group=heads_per_group, head_dim=architecture.head_dim)
    rows = [
        ("self_attention.linear_qkv.layer_norm_weight", ("input_layernorm.weight",), Rule()),
        ("self_attention.linear_qkv.weight", tuple(f"self_attn.{x}_proj.weight" for x in "qkv"), qkv),
    ]
    if architecture.qkv_bias:
        rows.append(("self_attention.linear_qkv.bias", tuple(f"self_attn.{x}_proj.bias" for x in "qkv"), qkv))
    if architecture.qk_norm:
        rows.append(("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",), Rule()))
        rows.append(("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",), Rule()))
    return [
        *rows,
        ("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), Rule(split_dim=1)),
        ("mlp.linear_fc1.layer_norm_weight", ("post_attention_layernorm.weight",), Rule()),
        ("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), GateUp()),
        ("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), Rule(split_dim=1)),
    ]
