"""What a model is, read from its Hugging Face `config.json`; needs neither torch nor Megatron."""

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from exprl_megatron.config.policy import Layout
from exprl_megatron.errors import UserError
from exprl_megatron.models import olmo3, qwen3_5
from exprl_megatron.models.delta_net import DeltaNet
from exprl_megatron.models.layer_types import LINEAR, SLIDING
from exprl_megatron.models.nearest import nearest
from exprl_megatron.models.rope import Rope, RopeScaling, YarnScaling, read_rope
from exprl_megatron.models.unsupported import unsupported, unsupported_beside_text

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3-moe",
    "MixtralForCausalLM": "mixtral",
    "MistralForCausalLM": "mistral",
    "SeedOssForCausalLM": "seed-oss",
    "Glm4MoeForCausalLM": "glm4-moe",
    "Olmo3ForCausalLM": "olmo3",
    "Qwen3_5ForCausalLM": "qwen3.5",
    "Qwen3_5ForConditionalGeneration": "qwen3.5",
    "Qwen3_5MoeForCausalLM": "qwen3.5-moe",
    "Qwen3_5MoeForConditionalGeneration": "qwen3.5-moe",
}
_HEAD_DIM = {"qwen3": 128, "seed-oss": 128, "qwen3.5": 256, "qwen3.5-moe": 256}
"""Dimensions of a head where config.json does not say and it is not the hidden size divided by the heads."""


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of layers' MLPs: a linear router, SwiGLU experts."""

    count: int
    top_k: int
    """Experts that each token is routed to."""
    ffn: int
    """Width of one expert."""
    norm_topk_prob: bool
    """Whether the chosen experts' weights are made to sum to 1."""
    dense_layers: int = 0
    """Layers at the model's beginning that have a dense MLP instead."""
    shared_ffn: int = 0
    """Width of the expert that every token goes to in addition; 0: there is none."""
    shared_gate: bool = False
    """Whether the shared expert's output is multiplied by the sigmoid of a gate, one number for each token."""
    sigmoid: bool = False
    """Whether the router takes a sigmoid of each logit, and adds a stored bias for the choice alone (DeepSeek-V3's way,
    arXiv 2412.19437, section 2.1.2); else softmax."""
    scaling: float = 1.0
    """What the chosen experts' weights are multiplied by at last."""


@dataclass(frozen=True)
class Architecture:
    """A decoder: RMSNorm before attention and before a SwiGLU MLP (or experts), rotary positions, grouped queries.

    Functions of one layer take the architecture of a model whose layers are all like it (see `of_layer`).
    """

    family: str
    """One of the values of FAMILIES."""
    layers: int
    hidden: int
    heads: int
    kv_groups: int
    head_dim: int
    ffn: int
    vocabulary: int
    norm_eps: float
    rope_base: float
    rope_scaling: RopeScaling | None
    qk_norm: bool
    qkv_bias: bool
    tied: bool
    """Whether the output layer is the input embedding."""
    max_positions: int
    initializer_range: float
    """Standard deviation of randomly initialized matrices."""
    experts: Experts | None = None
    """None: a dense MLP of width `ffn` in every layer."""
    rotary_share: float = 1.0
    """Share of a head's dimensions, the first ones, that turn with the position."""
    layer_types: tuple[str, ...] = ()
    """Of each layer what its attention is, in config.json's words, where layers differ in it; (): they do not."""
    window: int | None = None
    """Of how many tokens, itself the last of them, a token's attention sees those of `sliding_attention` layers, whose
    positions are not stretched; None: all layers see all tokens."""
    post_norms: bool = False
    """Whether the norms of a layer are behind attention and MLP, and those of queries and keys over all heads together
    (Olmo 3); else in front of attention and MLP, and over each head."""
    delta_net: DeltaNet | None = None
    """What layers of type `linear_attention` have in place of attention; None: there are none."""
    output_gate: bool = False
    """Whether attention's output is multiplied by the sigmoid of a gate, which is projected together with the query."""
    zero_centered_norms: bool = False
    """Whether norms multiply by 1 + their weight (a gated delta net's output norm does not)."""
    prefix: str = "model."
    """Beginning of the names of all tensors but the output layer's."""
    left_out: tuple[str, ...] = ()
    """Prefixes of the names of tensors that a policy has no use for, as those of multi-token prediction: they are not
    loaded, and an exported model has them as the original has."""

    def of_layer(self, layer: int) -> "Architecture":
        """Return the model all of whose layers are like layer number `layer`, counted from 0."""
        found = self
        if self.experts is not None and self.experts.dense_layers:
            experts = replace(self.experts, dense_layers=0) if layer >= self.experts.dense_layers else None
            found = replace(found, experts=experts)
        if not self.layer_types:
            return found
        if self.layer_types[layer] == SLIDING:
            return replace(found, layer_types=(), rope_scaling=None)
        delta_net = found.delta_net if self.layer_types[layer] == LINEAR else None
        return replace(found, layer_types=(), window=None, delta_net=delta_net)

    def kinds(self, layers: Iterable[int] | None = None) -> dict["Architecture", int]:
        """Return each distinct result of `of_layer` for `layers` (None: all) and its number of layers."""
        first: dict[tuple[bool, str | None], int] = {}
        counts: Counter[tuple[bool, str | None]] = Counter()
        for layer in range(self.layers) if layers is None else layers:
            dense = self.experts is not None and layer < self.experts.dense_layers
            mark = dense, self.layer_types[layer] if self.layer_types else None
            first.setdefault(mark, layer)
            counts[mark] += 1
        return {self.of_layer(first[mark]): count for mark, count in counts.items()}

    @property
    def attention_layers(self) -> int:
        """Layers with attention, which keep keys and values; the others have a gated delta net."""
        return sum(count for kind, count in self.kinds().items() if kind.delta_net is None)

    @property
    def attention_factor(self) -> float:
        """The factor of rotated queries and of rotated keys."""
        return self.rope_scaling.attention_factor if isinstance(self.rope_scaling, YarnScaling) else 1.0

    @property
    def stretched_positions(self) -> int:
        """The length to which YaRN stretches the original one; max_positions where positions are not so stretched."""
        scaling = self.rope_scaling
        if not isinstance(scaling, YarnScaling):
            return self.max_positions
        return int(scaling.factor * scaling.original_max_positions)


def read_architecture(directory: str | Path) -> Architecture:
    """Return the architecture that `directory`/config.json describes.

    Raises:
        UserError: there is no such file, or it describes a model that is not supported.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise UserError(f"{directory} has no config.json; give a model directory in Hugging Face form.")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON ({error}); fetch the model again.") from error
    names = tree.get("architectures") or ["none"]
    if names[0] not in FAMILIES:
        raise UserError(
            f"{path} describes the architecture {names[0]}, which is not supported; the nearest supported one is "
            f"{nearest(names[0], tree)}, and docs/models.md lists all and tells how one is added."
        )
    whole, tree = tree, qwen3_5.text_settings(tree, str(path))
    setting = unsupported(tree) or (None if tree is whole else unsupported_beside_text(whole))
    if setting is not None:
        raise UserError(f"{path} has {setting}, which is not supported; choose another model.")
    try:
        found = _architecture(FAMILIES[names[0]], tree, read_rope(tree, str(path)))
    except KeyError as error:
        raise UserError(f"{path} lacks {error}; fetch the model again.") from error
    if found.head_dim * found.rotary_share % 2:
        raise UserError(
            f"{path} has partial_rotary_factor {found.rotary_share} of heads of {found.head_dim} dimensions, which do "
            f"not turn in pairs; choose another model."
        )
    return found


def layout_violations(architecture: Architecture, layout: Layout) -> list[str]:
    """Return one sentence for each way in which `layout` cannot hold `architecture` (the vocabulary is padded
    to fit).
    """
    found = []
    if architecture.window is not None and layout.cp > 1:
        found.append(
            f"policy.layout.cp is {layout.cp} but attention of this {architecture.family} model has windows, which is "
            f"not supported under context parallelism; set it to 1."
        )
    for what, count in (*_attention_heads(architecture), *_mlp_columns(architecture)):
        if count % layout.tp:
            found.append(
                f"policy.layout.tp is {layout.tp}, which does not divide the model's {count} {what}; "
                f"use one of {_divisors(architecture)}."
            )
    if architecture.delta_net is not None and layout.cp > 1:
        found.append(
            f"policy.layout.cp is {layout.cp}, but the model's gated delta net layers need each sequence whole; set it "
            f"to 1."
        )
    found += _expert_violations(architecture.experts, layout)
    slots = architecture.layers + layout.embedding_as_layer + layout.head_as_layer
    if slots % layout.stages:
        counted = " with embedding or output layer counted in" if slots > architecture.layers else ""
        found.append(
            f"policy.layout.pp x vpp is {layout.stages}, which does not divide the model's {slots} layers{counted}; "
            f"change pp or vpp."
        )
    elif slots == layout.stages and slots > architecture.layers:
        found.append("policy.layout leaves the first or last stage without a layer; use fewer stages.")
    return found


def position_violations(architecture: Architecture, max_tokens: int, model: str) -> list[str]:
    """Return the sentence for the user where `policy.max_tokens` is more than the positions of `model`, a directory."""
    positions, stretched = architecture.max_positions, architecture.stretched_positions
    if max_tokens <= positions:
        return []
    remedy = "lower it"
    if max_tokens <= stretched:
        remedy += (
            f", or set max_position_embeddings in its config.json, which servers use, to {stretched}: YaRN stretches "
            f"its positions as far"
        )
    return [
        f"policy.max_tokens is {max_tokens}, more than the {positions} positions that {model} was made for; {remedy}."
    ]


def stage_layers(architecture: Architecture, layout: Layout) -> list[list[range]]:
    """Return the layers, counted from 0, as [pipeline rank][virtual stage]; `layout` must fit (see check_layout).

    Stage k of pp x vpp is on rank k modulo pp, as Megatron interleaves them.
    """
    slots = architecture.layers + layout.embedding_as_layer + layout.head_as_layer
    each = slots // layout.stages
    before = int(layout.embedding_as_layer)
    cuts = [min(max(stage * each - before, 0), architecture.layers) for stage in range(layout.stages + 1)]
    return [
        [range(cuts[chunk * layout.pp + rank], cuts[chunk * layout.pp + rank + 1]) for chunk in range(layout.vpp)]
        for rank in range(layout.pp)
    ]


def padded_vocabulary(architecture: Architecture, tp: int) -> int:
    """Return the rows of the embedding: the vocabulary, rounded up to a multiple of the tensor-parallel size."""
    return math.ceil(architecture.vocabulary / tp) * tp


def check_layout(architecture: Architecture, layout: Layout) -> None:
    """Check that `architecture` can be divided as `layout` says.

    Raises:
        UserError: it cannot; the error lists every violation, one a line.
    """
    found = layout_violations(architecture, layout)
    if found:
        raise UserError("\n".join(found))


def _attention_heads(architecture: Architecture) -> list[tuple[str, int]]:
    """Return the parts of attention that tensor parallelism divides, and how many there are of each."""
    found = [("attention heads", architecture.heads), ("KV groups", architecture.kv_groups)]
    if (net := architecture.delta_net) is not None:
        found += [("key heads of gated delta nets", net.key_heads), ("value heads", net.value_heads)]
    return found


def _mlp_columns(architecture: Architecture) -> list[tuple[str, int]]:
    """Return the columns of MLPs that tensor parallelism divides, and how many there are of each."""
    kinds = [kind.experts for kind in architecture.kinds()]
    found = [("MLP columns", architecture.ffn)] if None in kinds else []
    return found + [("shared expert's columns", e.shared_ffn) for e in kinds if e is not None and e.shared_ffn]


def _expert_violations(experts: Experts | None, layout: Layout) -> list[str]:
    if experts is None:
        sizes = [("ep", layout.ep), ("etp", layout.etp)]
        return [
            f"policy.layout.{name} is {size} but the model has no experts; set it to 1."
            for name, size in sizes
            if size > 1
        ]
    found = []
    if experts.count % layout.ep:
        found.append(
            f"policy.layout.ep is {layout.ep}, which does not divide the model's {experts.count} experts; change it."
        )
    if experts.ffn % layout.etp:
        found.append(
            f"policy.layout.etp is {layout.etp}, which does not divide an expert's {experts.ffn} columns; change it."
        )
    # With ep above 1 the layout itself has said so already.
    if layout.tp > 1 and layout.ep == 1 and not layout.sequence_parallel:
        found.append(
            f"policy.layout.tp is {layout.tp} and the model has experts, which needs sequence_parallel; turn it on."
        )
    return found


def _divisors(architecture: Architecture) -> str:
    """Return the tensor-parallel sizes that fit."""
    counts = [count for _, count in (*_attention_heads(architecture), *_mlp_columns(architecture))]
    return ", ".join(str(n) for n in range(1, architecture.kv_groups + 1) if not any(count % n for count in counts))


def _architecture(family: str, tree: dict, rope: Rope) -> Architecture:
    heads = tree["num_attention_heads"]
    glm, qwen, olmo = family == "glm4-moe", family in ("qwen3.5", "qwen3.5-moe"), family == "olmo3"
    return Architecture(
        family=family,
        layers=tree["num_hidden_layers"],
        hidden=tree["hidden_size"],
        heads=heads,
        kv_groups=_kv_groups(family, tree) or heads,
        head_dim=tree.get("head_dim", _HEAD_DIM.get(family)) or tree["hidden_size"] // heads,
        ffn=tree["moe_intermediate_size" if family == "qwen3.5-moe" else "intermediate_size"],
        vocabulary=tree["vocab_size"],
        norm_eps=tree["rms_norm_eps"],
        rope_base=rope.base,
        rope_scaling=rope.scaling,
        qk_norm=qwen or family in ("qwen3", "qwen3-moe", "olmo3") or (glm and tree.get("use_qk_norm", False)),
        qkv_bias=family in ("qwen2", "seed-oss") or (glm and tree.get("attention_bias", False)),
        tied=tree.get("tie_word_embeddings", False),
        max_positions=tree.get("max_position_embeddings", 2048),
        initializer_range=tree.get("initializer_range", 0.02),
        experts=_experts(family, tree),
        rotary_share=rope.share,
        layer_types=olmo3.layer_types(tree) if olmo else qwen3_5.layer_types(tree) if qwen else (),
        window=olmo3.window(tree) if olmo else None,
        post_norms=olmo,
        delta_net=qwen3_5.delta_net(tree) if qwen and LINEAR in qwen3_5.layer_types(tree) else None,
        output_gate=qwen,
        zero_centered_norms=qwen,
        prefix=qwen3_5.prefix(tree) if qwen else "model.",
        left_out=qwen3_5.left_out(tree) if qwen else _left_out(tree) if glm else (),
    )


def _kv_groups(family: str, tree: dict) -> int | None:
    """Return None for as many groups as heads, which a setting left out means in these families, else the number."""
    return tree.get("num_key_value_heads") if family in ("llama", "olmo3") else tree["num_key_value_heads"]


def _experts(family: str, tree: dict) -> Experts | None:
    if family == "qwen3-moe":
        return Experts(
            # transformers 5 writes the second name, published checkpoints have the first.
            count=tree["num_experts"] if "num_experts" in tree else tree["num_local_experts"],
            top_k=tree["num_experts_per_tok"],
            ffn=tree["moe_intermediate_size"],
            norm_topk_prob=tree.get("norm_topk_prob", False),
        )
    if family == "qwen3.5-moe":
        return Experts(
            count=tree["num_experts"] if "num_experts" in tree else tree["num_local_experts"],
            top_k=tree["num_experts_per_tok"],
            ffn=tree["moe_intermediate_size"],
            norm_topk_prob=True,
            shared_ffn=tree["shared_expert_intermediate_size"],
            shared_gate=True,
        )
    if family == "mixtral":
        return Experts(tree["num_local_experts"], tree["num_experts_per_tok"], tree["intermediate_size"], True)
    if family == "glm4-moe":
        return Experts(
            count=tree["n_routed_experts"],
            top_k=tree["num_experts_per_tok"],
            ffn=tree["moe_intermediate_size"],
            norm_topk_prob=True,
            dense_layers=tree.get("first_k_dense_replace", 1),
            shared_ffn=tree["moe_intermediate_size"],
            sigmoid=True,
            scaling=tree.get("routed_scaling_factor", 1.0),
        )
    return None


def _left_out(tree: dict) -> tuple[str, ...]:
    """Return the layers of multi-token prediction, which are stored behind the others."""
    # transformers 5 writes the second name, published checkpoints have the first.
    count = tree.get("num_nextn_predict_layers", tree.get("num_mtp_layers", 1))
    return tuple(f"model.layers.{tree['num_hidden_layers'] + index}." for index in range(count))
