"""The formula of activations beside what torch saves, what Megatron schedules and what the paper counts."""

from dataclasses import replace

import pytest
import torch
from helpers.meta import pretend_world

from exprl_megatron.config.policy import Layout, PolicyConfig
from exprl_megatron.config.precision import PrecisionConfig
from exprl_megatron.models.architecture import Architecture
from exprl_megatron.planning.activations import activation_bytes, chunks_in_flight, layer_bytes_per_token
from exprl_megatron.planning.targets import find_architecture
from exprl_megatron.policy.model import build_chunks
from exprl_megatron.policy.world import enter_world, leave_world

TOKENS = 64


def tiny(model: str, layers: int) -> Architecture:
    shape = {"hidden": 64, "heads": 4, "kv_groups": 2, "head_dim": 16, "ffn": 192, "vocabulary": 128}
    return replace(find_architecture(model)[0], layers=layers, **shape)


def saved_bytes(architecture: Architecture) -> int:
    """Bytes of all storages but parameters that a forward pass of TOKENS tokens keeps on the CPU."""
    world = enter_world(Layout())
    (chunk,) = build_chunks(architecture, PolicyConfig(model="none"), world)
    for parameter in chunk.parameters():
        torch.nn.init.normal_(parameter.data, 0, 0.02)
    own = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        chunk(torch.zeros(1, TOKENS, dtype=torch.long), torch.arange(TOKENS)[None], None)
    leave_world()
    return sum(storage.nbytes() for storage in kept.values())


def cpu_extras(architecture: Architecture) -> int:
    """fp32 numbers that the CPU's layer keeps for a token and Transformer Engine's does not."""
    a = architecture
    queries, keys = a.heads * a.head_dim, a.kv_groups * a.head_dim
    norms = 2 * (a.hidden + 1)  # the normalized input before its weight, and 1 / rms
    if a.qk_norm:
        # Norms of queries and keys as above; values keep the whole of the QKV product alive, keys their part of it.
        return norms + (queries + a.heads) + (keys + a.kv_groups) + queries
    return norms + (queries + keys)


@pytest.mark.parametrize("model", ["llama-3.1-8b", "qwen3-4b"])
def test_a_layer_keeps_what_the_formula_says_and_the_cpus_extras(model):
    one, three = tiny(model, layers=1), tiny(model, layers=3)
    measured = (saved_bytes(three) - saved_bytes(one)) / 2 / TOKENS
    assert measured == layer_bytes_per_token(one, Layout(), PrecisionConfig()) + 4 * cpu_extras(one)


def test_experts_keep_between_the_formula_and_twice_that():
    """Which expert gets how many tokens is chance, and the CPU runs experts one by one, unfused."""
    experts = replace(find_architecture("qwen3-30b-a3b")[0].experts, count=8, top_k=2, ffn=32)
    one, three = (replace(tiny("qwen3-30b-a3b", layers), experts=experts) for layers in (1, 3))
    measured = (saved_bytes(three) - saved_bytes(one)) / 2 / TOKENS
    planned = layer_bytes_per_token(one, Layout(), PrecisionConfig())
    assert planned < measured < 2 * planned


def test_a_shared_expert_keeps_what_a_dense_mlp_of_its_width_does_but_for_its_input():
    experts = replace(find_architecture("qwen3-30b-a3b")[0].experts, count=8, top_k=2, ffn=32)
    plain = [replace(tiny("qwen3-30b-a3b", layers), experts=experts) for layers in (1, 3)]
    shared = [replace(one, experts=replace(experts, shared_ffn=48)) for one in plain]
    # Both have the same router, so chance is the same too.
    measured = ((saved_bytes(shared[1]) - saved_bytes(shared[0])) - (saved_bytes(plain[1]) - saved_bytes(plain[0]))) / 2
    planned = [layer_bytes_per_token(one[0], Layout(), PrecisionConfig()) for one in (plain, shared)]
    # SwiGLU's input and output; the CPU's computes the activated gate again.
    assert measured / TOKENS == planned[1] - planned[0]


@pytest.mark.parametrize("tp", [1, 4])
def test_a_layer_without_gate_and_dropout_is_the_papers(tp):
    """arXiv 2205.05198, section 4: 34 s b h / t with sequence parallelism and attention recomputed, of which dropout's
    masks are 2; all heads have keys, the MLP is 4 h wide. SwiGLU's gate is 2 bytes x 4 h more."""
    architecture = replace(find_architecture("llama-3.1-8b")[0], kv_groups=32, ffn=4 * 4096)
    layout = Layout(tp=tp, sequence_parallel=tp > 1)
    kept = layer_bytes_per_token(architecture, layout, PrecisionConfig(kind="bf16"))
    statistics, gate = 4 * architecture.heads / tp, 2 * architecture.ffn / tp
    assert kept - statistics - gate == (34 - 2) * architecture.hidden / tp


@pytest.mark.parametrize(
    "layout", [pytest.param(Layout(pp=4, vpp=3), marks=pytest.mark.slow), Layout(pp=4), Layout(pp=2, vpp=2)]
)
def test_as_many_chunks_are_in_flight_as_megatron_schedules(layout):
    # Imported here: the package prepares a machine without CUDA for Megatron before its first import.
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    for pp_rank in range(layout.pp):
        with pretend_world(layout, pp_rank):
            for micro_batches in (2, 4, 8):
                total, _, warm_up, rest = get_pp_rank_microbatches(micro_batches, layout.vpp, layout.pp)
                assert chunks_in_flight(layout, pp_rank, micro_batches) == min(warm_up + (rest > 0), total)


def test_full_recomputation_keeps_a_layers_input():
    architecture = tiny("llama-3.1-8b", layers=8)
    policy = PolicyConfig(model="none", precision="bf16", recompute="full", micro_batch_tokens=TOKENS)
    once = layer_bytes_per_token(architecture, Layout(), policy.precision)
    final_norm = 2 * 2 * architecture.hidden
    assert activation_bytes(architecture, policy, 0, 1) == TOKENS * (8 * 2 * architecture.hidden + once + final_norm)
