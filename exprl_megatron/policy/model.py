"""Megatron's GPTModel for an Architecture, in the layout of the World that this process is in."""

import math
import os
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from exprl_megatron.config.policy import PolicyConfig
from exprl_megatron.models.architecture import Architecture, Experts, check_layout, padded_vocabulary, stage_layers
from exprl_megatron.models.layer_types import FULL, SLIDING
from exprl_megatron.policy.emulation import emulate_fp8
from exprl_megatron.policy.frequencies import rope_frequencies
from exprl_megatron.policy.gated_delta_net import cuda_block, delta_net_settings
from exprl_megatron.policy.gradient_fusion import fuses_gradients
from exprl_megatron.policy.local_layers import RotationTable
from exprl_megatron.policy.local_spec import POST_NORM, local_block
from exprl_megatron.policy.post_norm import Modules, post_norm_block, two_tables
from exprl_megatron.policy.precision import fp8_settings
from exprl_megatron.policy.router_replay import forget_routers
from exprl_megatron.policy.world import World

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_KERNELS = {
    AttnBackend.auto: (1, 1, 1),
    AttnBackend.fused: (0, 1, 0),
    AttnBackend.flash: (1, 0, 0),
    AttnBackend.unfused: (0, 0, 1),
}
"""Which of flash, fused (cuDNN's) and unfused attention Megatron demands to be allowed (1) for each backend."""


def build_chunks(
    architecture: Architecture, config: PolicyConfig, world: World, *, meta: bool = False
) -> list[GPTModel]:
    """Build this rank's share of the model, one GPTModel per virtual pipeline stage; weights are not yet set.

    `meta`: the same modules with shapes and dtypes but no memory, on torch's meta device.
    Raises UserError where the layout cannot hold the architecture.
    """
    check_layout(architecture, config.layout)
    stages = [stage if config.layout.vpp > 1 else None for stage in range(config.layout.vpp)]
    with torch.device("meta") if meta else nullcontext():
        chunks = [_chunk(architecture, config, world, stage, meta) for stage in stages]
    forget_routers()
    return chunks


def transformer_config(architecture: Architecture, config: PolicyConfig, device: torch.device) -> TransformerConfig:
    """Return Megatron's own configuration; `device` decides which fused kernels are asked for."""
    layout, dtype, cuda = config.layout, DTYPES[config.precision.dtype], device.type == "cuda"
    fused = fuses_gradients(config, cuda)
    recompute: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": {"recompute_granularity": "selective"},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    return TransformerConfig(
        num_layers=architecture.layers,
        hidden_size=architecture.hidden,
        num_attention_heads=architecture.heads,
        num_query_groups=architecture.kv_groups,
        kv_channels=architecture.head_dim,
        ffn_hidden_size=architecture.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm and not architecture.post_norms,
        layernorm_zero_centered_gamma=architecture.zero_centered_norms,
        attention_output_gate=architecture.output_gate,
        **delta_net_settings(architecture),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        sequence_parallel=layout.sequence_parallel,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        account_for_embedding_in_pipeline_split=layout.embedding_as_layer,
        account_for_loss_in_pipeline_split=layout.head_as_layer,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Weights are read or drawn by policy.huggingface, layout-independently.
        perform_initialization=False,
        use_cpu_initialization=not cuda,
        # The policy divides by the global token count itself.
        calculate_per_token_loss=True,
        # Micro-batches differ in length; Megatron ties that to this setting even for dense models.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        overlap_p2p_comm=layout.vpp > 1,
        batch_p2p_comm=layout.vpp == 1,
        batch_p2p_sync=cuda,
        # gloo may still be reading an output when the schedule would free it.
        deallocate_pipeline_outputs=cuda,
        attention_softmax_in_fp32=True,
        softmax_scale=_softmax_scale(architecture),
        attention_backend=attention_backend(os.environ, dtype),
        bias_activation_fusion=cuda,
        # What the local spec gives for an activation function is taken under this name.
        use_te_activation_func=not cuda,
        bias_dropout_fusion=cuda,
        apply_rope_fusion=True,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=fused,
        # Else Transformer Engine overwrites the buffers in the first micro-batch of each pass, and a step has several.
        disable_parameter_transpose_cache=fused,
        persist_layer_norm=False,
        **_windows(architecture),
        **_expert_settings(architecture, config, cuda),
        **fp8_settings(config.precision),
        **recompute[config.recompute],
    )


def attention_backend(environment: Mapping[str, str], dtype: torch.dtype) -> AttnBackend:
    """Return the first of Megatron's backends that agrees with what the user has set of Transformer Engine's variables.

    Megatron refuses to build a model whose backend demands another value of one of them; `auto`, the default here,
    demands all three kernels to be allowed. cuDNN's and flash attention compute in 16 bits only.
    """
    candidates = [backend for backend in _KERNELS if dtype != torch.float32 or _KERNELS[backend][2]]
    for backend in candidates:
        allowed = zip(("FLASH", "FUSED", "UNFUSED"), _KERNELS[backend], strict=True)
        if all(environment.get(f"NVTE_{kernel}_ATTN", str(value)) == str(value) for kernel, value in allowed):
            return backend
    return AttnBackend.auto


def _softmax_scale(architecture: Architecture) -> float | None:
    """Return the factor of the attention scores; None: Megatron's own 1 / sqrt(head_dim).

    YaRN's factor on queries and on keys is its square here. Transformer Engine's kernel that rotates packed rows takes
    no factor, and Megatron says nothing of it (rope_utils.py, apply_rotary_pos_emb). All of a head must rotate.
    """
    factor = architecture.attention_factor
    return None if factor == 1.0 else factor**2 / math.sqrt(architecture.head_dim)


def _windows(architecture: Architecture) -> dict:
    """Return Megatron's window settings: it counts the tokens before a token, and marks layers with windows by 1."""
    if architecture.window is None:
        return {}
    marks = [int(kind == SLIDING) for kind in architecture.layer_types]
    return {"window_size": (architecture.window - 1, 0), "window_attn_skip_freq": marks}


def _expert_settings(architecture: Architecture, config: PolicyConfig, cuda: bool) -> dict:
    """Return Megatron's settings for a mixture of experts; none for a dense model."""
    experts = architecture.experts
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.count,
        "moe_router_topk": experts.top_k,
        "moe_ffn_hidden_size": experts.ffn,
        # Softmax over the chosen experts alone is softmax over all, made to sum to 1 over the chosen.
        "moe_router_pre_softmax": not experts.norm_topk_prob,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss" if config.moe_aux_loss else "none",
        "moe_aux_loss_coeff": config.moe_aux_loss,
        "moe_grouped_gemm": cuda,
        "moe_permute_fusion": cuda,
        # moe_router_fusion, which is off by default, would go past it without a word.
        "moe_enable_routing_replay": config.router_replay is not False,
        **_unlike_layers(architecture.layers, experts),
        **_sigmoid_router(experts),
    }


def _unlike_layers(layers: int, experts: Experts) -> dict:
    """Return which of the `layers` have experts, where not all have, and the expert that all tokens go to."""
    found: dict = {}
    if experts.dense_layers:
        found["moe_layer_freq"] = [int(layer >= experts.dense_layers) for layer in range(layers)]
    if experts.shared_ffn:
        found["moe_shared_expert_intermediate_size"] = experts.shared_ffn
        found["moe_shared_expert_gate"] = experts.shared_gate
    return found


def _sigmoid_router(experts: Experts) -> dict:
    """Return settings of a sigmoid router with a fixed bias for the choice, on which the servers' choice
    depends too.
    """
    if not experts.sigmoid:
        return {}
    return {
        "moe_router_score_function": "sigmoid",
        "moe_router_pre_softmax": True,
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_topk_scaling_factor": experts.scaling,
    }


def _chunk(architecture: Architecture, config: PolicyConfig, world: World, stage: int | None, meta: bool) -> GPTModel:
    layout = config.layout
    place = torch.device("meta") if meta else world.device
    megatron = transformer_config(architecture, config, world.device)
    # Transformer Engine's layers ask for it; Megatron's own follow torch's default device.
    megatron.init_model_with_meta_device = meta
    block = _block(architecture, megatron, world, stage)
    chunk = GPTModel(
        megatron,
        block,
        vocab_size=padded_vocabulary(architecture, layout.tp),
        max_sequence_length=config.max_tokens,
        pre_process=world.pp_rank == 0 and stage in (None, 0),
        post_process=world.last_stage and stage in (None, layout.vpp - 1),
        share_embeddings_and_output_weights=architecture.tied,
        position_embedding_type="rope",
        rotary_base=architecture.rope_base,
        rotary_percent=architecture.rotary_share,
        vp_stage=stage,
    )
    if world.device.type != "cuda":
        chunk.rotary_pos_emb = RotationTable(
            architecture.head_dim, rotary_percent=architecture.rotary_share, use_cpu_initialization=True
        )
    if config.precision.emulate:
        emulate_fp8(chunk, config.precision)
    chunk.rotary_pos_emb.inv_freq = _frequencies(architecture).to(place)
    return chunk.to(place)


def _block(
    architecture: Architecture, megatron: TransformerConfig, world: World, stage: int | None
) -> TransformerBlockSubmodules:
    """Return the layers of virtual stage `stage` of this rank, of Transformer Engine's modules on CUDA."""
    cuda = world.device.type == "cuda"
    layers = stage_layers(architecture, world.layout)[world.pp_rank][stage or 0]
    if architecture.post_norms:
        return post_norm_block(_transformer_engine_modules() if cuda else POST_NORM, len(layers))
    if cuda:
        return cuda_block(megatron, stage)
    return local_block(megatron, [architecture.of_layer(layer) for layer in layers])


def _transformer_engine_modules() -> Modules:
    from exprl_megatron.policy.post_norm_te import MODULES

    return MODULES


def _frequencies(architecture: Architecture) -> torch.Tensor:
    """Return the frequencies of the rotary table; of both tables together where some layers are not stretched."""
    if architecture.window is None:
        return rope_frequencies(architecture)
    full, window = (architecture.of_layer(architecture.layer_types.index(kind)) for kind in (FULL, SLIDING))
    return two_tables(rope_frequencies(full), rope_frequencies(window))
