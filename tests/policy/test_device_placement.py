"""Where tensors are made: what builds tensors for the model runs on a GPU that is not there.

Under torch's FakeTensorMode tensors of `cuda:0` have shapes and no numbers, and an operation on two devices raises.
What needs a real CUDA library stops there, and is not imitated:

* The model of a policy on CUDA consists of Transformer Engine's layers: without that package Megatron's
  `get_gpt_decoder_block_spec` has none to name (`TESpecProvider` is None), and with it the first product of a forward
  pass fails in the compiled extension (cudaErrorInsufficientDriver).
* A backward pass through autograd's engine asks CUDA for its streams (`hasPrimaryContext`): the gradient of our own
  function is called as the function that it is.
"""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.witness import sequences
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from exprl_megatron.algorithms import aggregation
from exprl_megatron.algorithms.batch import PER_TOKEN, MicroBatch, pad
from exprl_megatron.algorithms.objective import distillation_objective, policy_objective, supervised_objective
from exprl_megatron.config.losses import CorrectionConfig, LossConfig
from exprl_megatron.config.policy import Layout, PolicyConfig
from exprl_megatron.models import fp8_blocks as fp8
from exprl_megatron.policy import log_probs
from exprl_megatron.policy.host_memory import HostMemory, host_copies, storages_of
from exprl_megatron.policy.model_input import model_input
from exprl_megatron.policy.offload import Offload
from exprl_megatron.policy.packing import PackingShape, plan_micro_batches
from exprl_megatron.policy.policy import Policy
from exprl_megatron.policy.step import MicroBatches
from exprl_megatron.policy.world import World
from exprl_megatron.weight_sync.weight_check import to_served_dtypes
from exprl_megatron.weight_sync.weight_exporter import WeightExporter, quantize_into

CUDA = torch.device("cuda", 0)
WORLD = World(Layout(), CUDA, 0, 0, 0, 0)
SEQUENCES = sequences(128)


@pytest.fixture(autouse=True)
def no_driver(monkeypatch):
    """What asks the driver and makes no tensor does nothing."""
    for name in ("synchronize", "empty_cache", "ipc_collect"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))


@pytest.fixture
def gpu():
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()) as mode:
        yield mode


def on_gpu(*tensors: torch.Tensor) -> bool:
    return bool(tensors) and all(tensor.device == CUDA for tensor in tensors)


def tensors_of(record) -> list[torch.Tensor]:
    return [value for value in vars(record).values() if isinstance(value, torch.Tensor)]


def scored() -> list:
    """The sequences with all that a loss may want of each token."""
    values = {name: lambda n: np.linspace(-1.0, 1.0, n, dtype=np.float32) for name in PER_TOKEN}
    made = []
    for sequence in SEQUENCES:
        given = {name: value(len(sequence.response_ids)) for name, value in values.items()}
        made.append(type(sequence)(sequence.prompt_ids, sequence.response_ids, **given))
    return made


def micro_batch(mode: FakeTensorMode) -> MicroBatch:
    """All sequences as a loss sees them, on the GPU."""
    with torch.utils._python_dispatch._disable_current_modes():
        made = pad(scored(), max(map(len, SEQUENCES)))
    tensors = {name: None if value is None else mode.from_tensor(value) for name, value in vars(made).items()}
    return MicroBatch(**tensors).to(CUDA)


@pytest.mark.parametrize(
    "shape", [PackingShape(False, row=64), PackingShape(True, row=64), PackingShape(True, 4, 128, cp=2)], ids=str
)
def test_a_step_s_inputs_are_on_the_gpu(gpu, shape):
    rows = scored()
    plan = plan_micro_batches([len(row) for row in rows], 1, 64, shape)
    work = list(MicroBatches(rows, plan, shape, WORLD))
    assert len(work) > 1
    for tokens, micro in work:
        assert len(tensors_of(micro)) == 2 + len(PER_TOKEN) and on_gpu(*tensors_of(tokens), *tensors_of(micro))


def response(mode: FakeTensorMode) -> dict[str, torch.Tensor]:
    """What the model's last layer hands over for one padded micro-batch."""
    with torch.utils._python_dispatch._disable_current_modes():
        length = max(map(len, SEQUENCES))
        tokens = model_input(SEQUENCES, length, PackingShape(False))
    hidden, width = (length, len(SEQUENCES), 16), (256, 16)
    indices = {name: mode.from_tensor(getattr(tokens, name)).to(CUDA) for name in ("places", "slots")}
    return indices | {
        "hidden": torch.empty(hidden, device=CUDA, dtype=torch.bfloat16),
        "weight": torch.empty(width, device=CUDA, dtype=torch.bfloat16),
        "targets": micro_batch(mode).targets,
    }


def response_log_probs(mode: FakeTensorMode, chunk: int | None) -> torch.Tensor:
    settings = {"temperature": 0.7, "vocabulary": 250, "chunk": chunk, "sequence_parallel": False}
    with torch.no_grad():
        return log_probs.response_log_probs(**response(mode), **settings)


@pytest.mark.parametrize("chunk", [None, 16])
def test_log_probs_are_computed_on_the_gpu(gpu, world, chunk):
    assert on_gpu(response_log_probs(gpu, chunk))


def test_gradients_of_log_probs_are_on_the_gpu(gpu):
    hidden = torch.empty(20, 16, device=CUDA, dtype=torch.bfloat16)
    weight = torch.empty(256, 16, device=CUDA, dtype=torch.bfloat16)
    targets, sums = torch.zeros(20, device=CUDA, dtype=torch.long), torch.empty(20, device=CUDA)
    context = SimpleNamespace(saved_tensors=(hidden, weight, targets, sums, sums), constants=(1.0, 250, 8))
    found = log_probs.VocabularyParallelLogProbs.backward(context, torch.empty(2, 20, device=CUDA))
    assert on_gpu(*(one for one in found if one is not None))


LOSSES = [
    LossConfig(surrogate=surrogate, aggregation=how, correction=CorrectionConfig(kind=kind), kl_coefficient=0.1)
    for surrogate in ("clip", "sequence-clip", "clipped-weight")
    for how in ("token-mean", "sequence-mean")
    for kind in ("none", "truncated", "masked")
]
OBJECTIVES = [*map(policy_objective, LOSSES), distillation_objective("token-mean"), supervised_objective()]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_and_metrics_are_on_the_gpu(gpu, objective):
    micro = micro_batch(gpu)
    values = torch.empty(2, *micro.targets.shape, device=CUDA)
    loss, metrics = objective(values[0], values[1], micro)
    assert on_gpu(loss, *metrics.values())


def moved(chunk: torch.nn.Module) -> torch.nn.Module:
    """The chunk with its parameters on the GPU."""
    for module in chunk.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=torch.bfloat16, device=CUDA)
                module._parameters[name] = torch.nn.Parameter(fake, requires_grad=False)
    return chunk


@pytest.fixture
def policy(tiny_model, world) -> Policy:
    return Policy(PolicyConfig(model=str(tiny_model("qwen3"))), seed=0)


@pytest.mark.parametrize("eight_bits", [False, True])
def test_buckets_are_filled_on_the_gpu(policy, gpu, eight_bits, monkeypatch):
    monkeypatch.setattr(fp8, "check_quantizable", lambda *_: None)
    chunks = [moved(chunk) for chunk in policy.chunks]
    exporter = WeightExporter(chunks, policy.architecture, WORLD, 40_000, source_ranks=None, fp8=eight_bits)
    assert len(exporter.rounds) > 2
    for number in range(len(exporter.rounds)):
        bucket = exporter.gather(number).named()
        assert on_gpu(*(tensor for _, tensor in bucket), *(tensor for _, tensor in to_served_dtypes(bucket)))


def stage_on_gpu() -> tuple[SimpleNamespace, list[torch.nn.Parameter]]:
    """A policy as far as an offload looks at it, and its parameters, which share their memory in part."""
    memory = torch.empty(1000, device=CUDA, dtype=torch.bfloat16)
    chunk = torch.nn.Module()
    chunk.first, chunk.second = (
        torch.nn.Parameter(memory[a:b], requires_grad=False) for a, b in ((0, 400), (400, 1000))
    )
    masters = [torch.nn.Parameter(torch.empty(size, device=CUDA)) for size in (400, 600)]
    adam = torch.optim.AdamW(masters)
    for master in masters:
        adam.state[master] = {name: torch.zeros_like(master) for name in ("exp_avg", "exp_avg_sq")}
        adam.state[master]["step"] = torch.zeros(())
    parameters = list(chunk.parameters())
    return SimpleNamespace(
        world=WORLD,
        chunks=[chunk],
        wrapped=[SimpleNamespace(buffers=[SimpleNamespace(grad_data=torch.empty(1000, device=CUDA))])],
        stage=SimpleNamespace(optimizer=SimpleNamespace(optimizer=adam)),
        weight_storages=lambda: storages_of(parameters),
        gather_weights=lambda: None,
        host_weights=HostMemory(CUDA),
    ), parameters


def test_what_leaves_the_gpu_waits_in_pinned_memory_and_comes_back_to_it(gpu, monkeypatch):
    policy, parameters = stage_on_gpu()
    policy.wrapped[0].expert_parallel_buffers = []
    moves = []
    for name in ("copy_from", "copy_to"):
        monkeypatch.setattr(HostMemory, name, noted(getattr(HostMemory, name), moves))
    move = Offload(policy)
    before = move.bytes_on_device()
    assert before == {"weights": 2000, "gradients": 4000, "optimizer": 12_000}
    move.offload("weights", "gradients", "optimizer")
    assert not any(move.bytes_on_device().values())
    move.onload("weights", "gradients", "optimizer")
    assert move.bytes_on_device() == before and on_gpu(*parameters)
    assert len(moves) == 4 and all(ours.device == CUDA and host.device.type == "cpu" for ours, host in moves)


def noted(method, moves):
    def call(self, storages):
        method(self, storages)
        moves.extend(list(self._pieces([storage for storage in storages if storage.nbytes()]))[:1])

    return call


def test_starting_weights_are_copied_to_the_host(gpu):
    named = {"a": torch.empty(3, 5, device=CUDA), "b": torch.empty(7, device=CUDA, dtype=torch.bfloat16)}
    copies = host_copies(named, CUDA)
    assert all(copies[name].device.type == "cpu" for name in named)
    assert {name: (one.shape, one.dtype) for name, one in copies.items()} == {
        name: (one.shape, one.dtype) for name, one in named.items()
    }


def without_device(made):
    return lambda *arguments, device=None, **settings: made(*arguments, **settings)


def keeps_the_mask_on_the_host(monkeypatch, mode):
    to = MicroBatch.to
    monkeypatch.setattr(MicroBatch, "to", lambda self, device: replace(to(self, device), mask=self.mask))
    micro = micro_batch(mode)
    supervised_objective()(torch.empty(micro.targets.shape, device=CUDA), micro.advantages, micro)


def makes_a_tile_on_the_host(monkeypatch, mode):
    made = SimpleNamespace(
        **{name: getattr(torch, name) for name in dir(torch)} | {"zeros": without_device(torch.zeros)}
    )
    monkeypatch.setattr(log_probs, "torch", made)
    response_log_probs(mode, None)


def weighs_tokens_on_the_host(monkeypatch, mode):
    weights = aggregation.token_weights
    monkeypatch.setattr(
        "exprl_megatron.algorithms.objective.token_weights", lambda mask, how: weights(mask, how).to("cpu")
    )
    micro = micro_batch(mode)
    values = torch.empty(micro.targets.shape, device=CUDA)
    policy_objective(LOSSES[0])(values, values, micro)


def forgets_to_move_targets(monkeypatch, mode):
    handed = response(mode)
    handed["targets"] = handed["targets"].to("cpu")
    monkeypatch.setattr("test_device_placement.response", lambda mode: handed)
    response_log_probs(mode, None)


def quantizes_with_scales_of_the_host(monkeypatch, mode):
    where = torch.where
    monkeypatch.setattr(torch, "where", lambda *arguments: where(*arguments).to("cpu"))
    weight = torch.empty(256, 256, device=CUDA)
    quantize_into(weight, torch.empty(256, 256, device=CUDA, dtype=torch.float8_e4m3fn), torch.empty(2, 2, device=CUDA))


@pytest.mark.parametrize(
    "mistake",
    [
        keeps_the_mask_on_the_host,
        makes_a_tile_on_the_host,
        weighs_tokens_on_the_host,
        forgets_to_move_targets,
        quantizes_with_scales_of_the_host,
    ],
)
def test_a_tensor_on_the_wrong_device_is_found(gpu, world, monkeypatch, mistake):
    with pytest.raises(RuntimeError, match=r"two devices|expected device"):
        mistake(monkeypatch, gpu)


def test_a_bucket_in_host_memory_is_found(policy, gpu):
    chunks = [moved(chunk) for chunk in policy.chunks]
    exporter = WeightExporter(
        chunks,
        policy.architecture,
        WORLD,
        40_000,
        source_ranks=None,
        allocate=lambda size: torch.empty(size, dtype=torch.uint8),
    )
    assert not on_gpu(*(tensor for _, tensor in exporter.gather(0).named())), "a copy may cross devices, and does"
