"""The table of names: which Hugging Face tensors make up which Megatron parameter, on which rank, and how.

Loading, export and every weight transport read this one table. It is pure: no process group, no Megatron,
and torch only where tensors are joined: the planner counts parameters by it.

Why not Megatron-Bridge or mbridge: they load and export whole models on initialized ranks. A weight sync also needs the
slice of a server's parameter for each shard, and the planner and the checks of a start read the table without Megatron.
The tests compare the table with mbridge's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from exprl_megatron.config.policy import Layout
from exprl_megatron.models.architecture import Architecture, Experts, stage_layers
from exprl_megatron.models.delta_net_names import DECAY, delta_net_rows, delta_net_shapes
from exprl_megatron.models.rules import GatedQueryKeyValue, GateUp, QueryKeyValue, Row, Rule, Vocabulary

if TYPE_CHECKING:
    import torch

type Bucket = list[tuple[str, torch.Tensor]]
"""Full tensors under their Hugging Face names."""
HEAD = "lm_head.weight"
ROUTER_BIAS = ".mlp.gate.e_score_correction_bias"
"""End of the name of the bias that a sigmoid router adds for the choice: fp32, whatever the rest of the model is in."""
_SHARED_GATE = "mlp.shared_expert_gate.weight"
_BUFFERS = ("mlp.router.expert_bias",)
"""Suffixes of Megatron's names of tensors that are not parameters: without gradient and optimizer state, fp32 in every
precision.
"""


def embedding(architecture: Architecture) -> str:
    """Return the name of the input embedding."""
    return f"{architecture.prefix}embed_tokens.weight"


def is_vocabulary(name: str) -> bool:
    """Return whether the Hugging Face tensor `name` has a row for each token: the embedding or the output layer."""
    return name == HEAD or name.endswith(".embed_tokens.weight")


def is_buffer(name: str) -> bool:
    """Return whether Megatron's `name` is of a buffer that belongs to the model's weights."""
    return name.endswith(_BUFFERS)


def dtype_of(name: str, dtype: str) -> str:
    """Return the dtype of the Hugging Face tensor `name` in a model of `dtype` (names of torch dtypes)."""
    return "float32" if name.endswith((ROUTER_BIAS, DECAY)) else dtype


@dataclass(frozen=True)
class Parameter:
    """One Megatron parameter or buffer: its rank, its name there, and the Hugging Face tensors that it consists of."""

    pp_rank: int
    chunk: int
    """Virtual pipeline stage on that rank."""
    name: str
    """Within the chunk: layers are counted from the chunk's first, experts from the rank's first."""
    hf_names: tuple[str, ...]
    rule: Rule
    exported: bool = True
    """False for the last stage's copy of a tied embedding."""
    ep_rank: int | None = None
    """The expert-parallel rank that has this expert, whose rule then cuts over expert-tensor-parallel ranks; None:
    no expert, on every rank of the stage and cut over tensor-parallel ranks."""

    @property
    def is_buffer(self) -> bool:
        """Whether it is a buffer that belongs to the model's weights."""
        return is_buffer(self.name)

    @property
    def keeps_dtype(self) -> bool:
        """Whether it is in fp32, whatever the rest of the model is in."""
        return dtype_of(self.hf_names[0], "bfloat16") == "float32"


def parameters(architecture: Architecture, layout: Layout, grouped: bool = False) -> list[Parameter]:
    """Return all Megatron parameters of all pipeline stages, from the embedding to the output layer.

    `grouped`: experts are named as Transformer Engine's grouped layers name them (on CUDA), else one by one.
    """
    last = (layout.pp - 1, layout.vpp - 1)
    vocabulary = Vocabulary(rows=architecture.vocabulary)
    table = [Parameter(0, 0, "embedding.word_embeddings.weight", (embedding(architecture),), vocabulary)]
    stages = stage_layers(architecture, layout)
    places = [(layers, pp, chunk) for pp, chunks in enumerate(stages) for chunk, layers in enumerate(chunks)]
    for layers, pp_rank, chunk in sorted(places, key=lambda place: place[0].start):
        for local, layer in enumerate(layers):
            for name, hf_names, rule, ep_rank in _layer(architecture.of_layer(layer), layout.ep, grouped):
                hf_full = tuple(f"{architecture.prefix}layers.{layer}.{hf_name}" for hf_name in hf_names)
                full = f"decoder.layers.{local}.{name}"
                table.append(Parameter(pp_rank, chunk, full, hf_full, rule, ep_rank=ep_rank))
    table.append(Parameter(*last, "decoder.final_layernorm.weight", (f"{architecture.prefix}norm.weight",), Rule()))
    if not architecture.tied:
        table.append(Parameter(*last, "output_layer.weight", (HEAD,), vocabulary))
    elif layout.pp > 1:
        table.append(Parameter(*last, "output_layer.weight", (embedding(architecture),), vocabulary, exported=False))
    return table


def hf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model in Hugging Face form, in the order of export."""
    hidden = architecture.hidden
    shapes: dict[str, tuple[int, ...]] = {embedding(architecture): (architecture.vocabulary, hidden)}
    layers = {kind: _layer_shapes(kind) for kind in architecture.kinds()}
    for index in range(architecture.layers):
        layer = layers[architecture.of_layer(index)]
        shapes |= {f"{architecture.prefix}layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes[f"{architecture.prefix}norm.weight"] = (hidden,)
    if not architecture.tied:
        shapes[HEAD] = (architecture.vocabulary, hidden)
    return shapes


def layers_are_alike(architecture: Architecture) -> bool:
    """Return whether all layers have the same tensors (what they compute may differ)."""
    every = [_layer_shapes(kind) for kind in architecture.kinds()]
    return all(shapes == every[0] for shapes in every)


def _layer_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a layer, in the order of export."""
    hidden, ffn = architecture.hidden, architecture.ffn
    query, key = architecture.heads * architecture.head_dim, architecture.kv_groups * architecture.head_dim
    known: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (2 * query if architecture.output_gate else query, hidden),
        "self_attn.k_proj.weight": (key, hidden),
        "self_attn.v_proj.weight": (key, hidden),
        "self_attn.q_proj.bias": (query,),
        "self_attn.k_proj.bias": (key,),
        "self_attn.v_proj.bias": (key,),
        "self_attn.q_norm.weight": (query if architecture.post_norms else architecture.head_dim,),
        "self_attn.k_norm.weight": (key if architecture.post_norms else architecture.head_dim,),
        "self_attn.o_proj.weight": (hidden, query),
        "post_attention_layernorm.weight": (hidden,),
        "post_feedforward_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
        **_expert_shapes(architecture),
        **(delta_net_shapes(architecture.delta_net, hidden) if architecture.delta_net else {}),
    }
    return {name: known[name] for _, hf_names, _, _ in _layer(architecture, 1, False) for name in hf_names}


def _layer(architecture: Architecture, ep: int, grouped: bool) -> list[Row]:
    """Return one layer's parameters, experts laid over `ep` ranks."""
    rows = delta_net_rows(architecture.delta_net) if architecture.delta_net else _attention_rows(architecture)
    if architecture.experts is not None:
        return rows + _expert_rows(architecture, architecture.experts, ep, grouped)
    if architecture.post_norms:
        behind, norm = "self_attention.linear_proj.post_layernorm.weight", "post_attention_layernorm.weight"
        rows.append((behind, (norm,), Rule(), None))
    else:
        rows.append(("mlp.linear_fc1.layer_norm_weight", ("post_attention_layernorm.weight",), Rule(), None))
    rows += [
        ("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), GateUp(), None),
        ("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), Rule(split_dim=1), None),
    ]
    if architecture.post_norms:
        rows.append(("mlp.linear_fc2.post_layernorm.weight", ("post_feedforward_layernorm.weight",), Rule(), None))
    return rows


def _attention_rows(architecture: Architecture) -> list[Row]:
    """Return the attention rows, and the norm before them where there is one."""
    kind = GatedQueryKeyValue if architecture.output_gate else QueryKeyValue
    qkv = kind(heads_per_group=architecture.heads // architecture.kv_groups, head_dim=architecture.head_dim)
    rows: list[Row] = []
    if not architecture.post_norms:
        rows.append(("self_attention.linear_qkv.layer_norm_weight", ("input_layernorm.weight",), Rule(), None))
    rows.append(("self_attention.linear_qkv.weight", tuple(f"self_attn.{x}_proj.weight" for x in "qkv"), qkv, None))
    if architecture.qkv_bias:
        rows.append(("self_attention.linear_qkv.bias", tuple(f"self_attn.{x}_proj.bias" for x in "qkv"), qkv, None))
    if architecture.qk_norm:
        rows += _query_and_key_norms(architecture.post_norms)
    return [*rows, ("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), Rule(split_dim=1), None)]


def _query_and_key_norms(whole_width: bool) -> list[Row]:
    """Return the norms: over each head Megatron's, the same on every rank; over all heads each rank has its heads'
    weights.
    """
    norm, rule = ("{}_norm", Rule(split_dim=0)) if whole_width else ("{}_layernorm", Rule())
    return [(f"self_attention.{norm.format(x)}.weight", (f"self_attn.{x}_norm.weight",), rule, None) for x in "qk"]


def _expert_rows(architecture: Architecture, experts: Experts, ep: int, grouped: bool) -> list[Row]:
    """Return the MLP of a layer of experts."""
    router, gate, up, down = _expert_names(architecture.family)
    rows: list[Row] = [
        ("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), Rule(), None),
        ("mlp.router.weight", (router,), Rule(), None),
    ]
    if experts.sigmoid:
        rows.append(("mlp.router.expert_bias", (ROUTER_BIAS.removeprefix("."),), Rule(), None))
    each = experts.count // ep
    for expert in range(experts.count):
        ep_rank, local = divmod(expert, each)
        fc1, fc2 = (
            f"mlp.experts.{layer}.weight{local}" if grouped else f"mlp.experts.local_experts.{local}.{layer}.weight"
            for layer in ("linear_fc1", "linear_fc2")
        )
        rows.append((fc1, (gate.format(expert), up.format(expert)), GateUp(), ep_rank))
        rows.append((fc2, (down.format(expert),), Rule(split_dim=1), ep_rank))
    if experts.shared_gate:
        rows.append(("mlp.shared_experts.gate_weight", (_SHARED_GATE,), Rule(), None))
    if experts.shared_ffn:
        gate, up, down = (f"{_shared(experts)}.{x}_proj.weight" for x in ("gate", "up", "down"))
        rows.append(("mlp.shared_experts.linear_fc1.weight", (gate, up), GateUp(), None))
        rows.append(("mlp.shared_experts.linear_fc2.weight", (down,), Rule(split_dim=1), None))
    return rows


def _shared(experts: Experts) -> str:
    """Return Hugging Face's name of the expert that all tokens go to."""
    return "mlp.shared_expert" if experts.shared_gate else "mlp.shared_experts"


def _expert_names(family: str) -> tuple[str, str, str, str]:
    """Return Hugging Face names of router, gate, up and down, the expert's number left open."""
    if family == "mixtral":
        block = "block_sparse_moe"
        gate, up, down = (f"{block}.experts.{{}}.{weight}.weight" for weight in ("w1", "w3", "w2"))
        return f"{block}.gate.weight", gate, up, down
    gate, up, down = (f"mlp.experts.{{}}.{weight}_proj.weight" for weight in ("gate", "up", "down"))
    return "mlp.gate.weight", gate, up, down


def _expert_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    experts, hidden = architecture.experts, architecture.hidden
    if experts is None:
        return {}
    router, gate, up, down = _expert_names(architecture.family)
    shapes: dict[str, tuple[int, ...]] = {router: (experts.count, hidden)}
    for expert in range(experts.count):
        shapes |= {name.format(expert): (experts.ffn, hidden) for name in (gate, up)}
        shapes[down.format(expert)] = (hidden, experts.ffn)
    if experts.sigmoid:
        shapes[ROUTER_BIAS.removeprefix(".")] = (experts.count,)
    if experts.shared_ffn:
        shapes |= {f"{_shared(experts)}.{x}_proj.weight": (experts.shared_ffn, hidden) for x in ("gate", "up")}
        shapes[f"{_shared(experts)}.down_proj.weight"] = (hidden, experts.shared_ffn)
    if experts.shared_gate:
        shapes[_SHARED_GATE] = (1, hidden)
    return shapes
