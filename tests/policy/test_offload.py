"""What leaves the device for its servers' turn: where it waits, that it comes back, and what is made again."""

import numpy as np
import pytest
import torch
from helpers.witness import loss_function, sequences, tokens

from exprl_megatron.config.policy import OptimizerConfig, PolicyConfig
from exprl_megatron.config.precision import PrecisionConfig
from exprl_megatron.policy import host_memory
from exprl_megatron.policy.checkpoint import load_checkpoint, save_checkpoint
from exprl_megatron.policy.host_memory import HostMemory, host_copies, storages_of
from exprl_megatron.policy.offload import Offload
from exprl_megatron.policy.policy import Policy

BATCH = sequences(128)
ALL = ("weights", "gradients", "optimizer")


@pytest.fixture(params=["fp32", "bf16"])
def policy(tiny_model, world, request) -> Policy:
    precision = PrecisionConfig(kind=request.param)
    return Policy(PolicyConfig(model=str(tiny_model("qwen3")), max_tokens=40, precision=precision), seed=0)


@pytest.fixture
def blocks(monkeypatch):
    """The sizes of all blocks of host memory that are allocated."""
    sizes, made = [], host_memory._block
    monkeypatch.setattr(host_memory, "_block", lambda size, pinned: sizes.append(size) or made(size, pinned))
    return sizes


def step(policy: Policy) -> None:
    policy.accumulate(BATCH, loss_function, 1.0, tokens(BATCH))
    policy.apply_update()


def state(policy: Policy) -> list[torch.Tensor]:
    """Weights, what the optimizer steps, and its moments."""
    (part,) = policy.stage.optimizer.chained_optimizers
    stepped = [p for group in part.optimizer.param_groups for p in group["params"]]
    moments = [one[name] for one in part.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return [tensor.detach().clone() for tensor in (*policy.chunks[0].parameters(), *stepped, *moments)]


def learned(policy: Policy, turns: bool) -> list[torch.Tensor]:
    offload = Offload(policy)
    policy.begin_stage(OptimizerConfig(lr=1e-2), total_steps=4)
    for _ in range(3):
        if turns:
            before, held = state(policy), offload.bytes_on_device()
            assert all(held.values())
            offload.offload("gradients", "optimizer")
            offload.offload("weights")
            assert offload.bytes_on_device() == dict.fromkeys(ALL, 0)
            offload.onload(*ALL)
            assert offload.bytes_on_device() == held
            assert all(torch.equal(a, b) for a, b in zip(state(policy), before, strict=True))
        step(policy)
    return state(policy)


def test_a_policy_that_takes_turns_learns_the_same_bits(policy):
    """In fp32 too, where the optimizer's parameters are views of the weights that must stay views."""
    expected = learned(Policy(policy.config, seed=0), turns=False)
    assert all(torch.equal(a, b) for a, b in zip(learned(policy, turns=True), expected, strict=True))


def test_host_memory_is_allocated_in_the_first_turn_alone(policy, blocks):
    policy.begin_stage(OptimizerConfig(lr=1e-2), total_steps=9, keep_ref_policy=True)
    offload = Offload(policy)
    kept = len(blocks)

    def turn():
        offload.offload(*ALL)
        offload.onload(*ALL)
        policy.log_probs(BATCH, 1.0, ref_policy=True)
        step(policy)

    turn()
    sizes = offload.bytes_on_device()
    assert sum(blocks[kept:]) == sizes["weights"] + sizes["optimizer"], "scoring the start takes the same memory"
    first = len(blocks)
    for _ in range(4):
        turn()
    assert len(blocks) == first


def test_a_new_stage_uses_the_memory_of_the_last(policy, blocks):
    offload = Offload(policy)
    for stage in range(3):
        policy.begin_stage(OptimizerConfig(lr=1e-2), total_steps=1)
        offload.offload(*ALL)
        offload.onload(*ALL)
        if stage == 0:
            first = len(blocks)
    assert len(blocks) == first


def test_what_is_loaded_from_a_checkpoint_can_leave_and_come_back(policy, tmp_path):
    policy.begin_stage(OptimizerConfig(lr=1e-2), total_steps=4, keep_ref_policy=True)
    start = policy.log_probs(BATCH, 1.0, ref_policy=True)
    step(policy)
    saved = save_checkpoint(tmp_path, policy, {}, keep=1)
    again = Policy(policy.config, seed=1)
    offload = Offload(again)
    again.begin_stage(OptimizerConfig(lr=1e-2), total_steps=4, keep_ref_policy=True)
    load_checkpoint(saved, again)
    offload.offload(*ALL)
    offload.onload(*ALL)
    assert all(torch.equal(a, b) for a, b in zip(state(again), state(policy), strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(again.log_probs(BATCH, 1.0, ref_policy=True), start, strict=True))
    step(policy), step(again)
    assert all(torch.equal(a, b) for a, b in zip(state(again), state(policy), strict=True))


def test_buckets_that_servers_have_let_go_of_leave_before_the_cache_is_emptied(policy, monkeypatch):
    done = []
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: done.append("collected"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("emptied"))
    offload = Offload(policy)
    offload._cuda = True
    offload.offload("weights")
    assert done == ["collected", "emptied"]


def test_quantized_copies_of_weights_leave_too(policy):
    """Transformer Engine's modules keep them in `_fp8_workspaces`, by name (transformer_engine/pytorch/module)."""
    linear = policy.chunks[0].decoder.layers[0].self_attention.linear_qkv
    linear._fp8_workspaces = {"weight": torch.ones(8)}
    offload = Offload(policy)
    offload.offload("gradients", "optimizer")
    assert linear._fp8_workspaces, "they are needed as long as the weights are"
    offload.offload("weights")
    assert linear._fp8_workspaces == {}


class Quantized:
    """A parameter in 8 bits, as Transformer Engine's tensors show their numbers by row and by column."""

    def __init__(self, *data):
        self.data = data

    def get_data_tensors(self):
        return self.data


def test_the_numbers_of_parameters_in_8_bits_are_what_leaves():
    rows, columns = torch.ones(4, 2, dtype=torch.uint8), torch.ones(2, 4, dtype=torch.uint8)
    found = storages_of([Quantized(rows, columns), Quantized(rows, None)])
    assert [storage.data_ptr() for storage in found] == [rows.data_ptr(), columns.data_ptr()]


@pytest.mark.parametrize("block", [1, 7, 64, 1000, 2**20])
def test_pieces_of_any_size_go_through_blocks_of_any_size(monkeypatch, block):
    monkeypatch.setattr(host_memory, "BLOCK_BYTES", block)
    tensors = [torch.randn(size) for size in (0, 1, 3, 50, 16, 200)]
    before = [tensor.clone() for tensor in tensors]
    memory = HostMemory(torch.device("cpu"))
    storages = storages_of(tensors)
    memory.copy_from(storages)
    assert memory.nbytes == 4 * 270
    for tensor in tensors:
        tensor.fill_(-1)
    memory.copy_to(storages)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    copies = host_copies(dict(enumerate(tensors)), torch.device("cpu"))
    assert all(torch.equal(copies[i], one) and copies[i].shape == one.shape for i, one in enumerate(before))


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_host_memory_is_pinned_for_a_gpu_and_its_copies_are_over_when_it_returns(monkeypatch, kind):
    done, empty = [], torch.empty

    def allocated(*arguments, pin_memory=False, **settings):
        done.append("pinned" if pin_memory else "pageable")
        return empty(*arguments, **settings)

    memory = HostMemory(torch.device(kind))
    # What follows needs no driver; that it is meant for a GPU is known from `kind` alone.
    memory._device = torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("synchronized"))
    weights = torch.arange(64.0)
    with monkeypatch.context() as allocating:
        allocating.setattr(torch, "empty", allocated)
        memory._reserve(weights.untyped_storage().nbytes())
    assert done == (["pinned"] if kind == "cuda" else ["pageable"])
    memory.copy_from([weights.untyped_storage()])
    kept, weights[:] = weights.clone(), 0
    memory.copy_to([weights.untyped_storage()])
    assert torch.equal(weights, kept)
    assert done[1:] == (["synchronized"] * 2 if kind == "cuda" else [])


def test_pinned_blocks_waste_little_of_what_torch_rounds_to_powers_of_two(blocks, monkeypatch):
    """70B's weights and optimizer on a GPU, 27.5 GiB, pinned at once would take 32."""
    monkeypatch.setattr(
        host_memory, "_block", lambda size, pinned: blocks.append(size) or torch.empty(size, device="meta")
    )
    HostMemory(torch.device("cuda"))._reserve(int(27.5 * 2**30))
    rounded = sum(2 ** (size - 1).bit_length() for size in blocks)
    assert len(blocks) == 28 and rounded < 1.02 * 27.5 * 2**30
