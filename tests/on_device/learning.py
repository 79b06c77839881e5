"""The miniature learning its training problems' solutions, in any precision and layout, and a reference for it."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import transformers
from helpers.ranks import run_ranks

from exprl_megatron.algorithms.batch import MicroBatch, TrainSample
from exprl_megatron.config.load import check_config
from exprl_megatron.config.policy import Layout, OptimizerConfig, PolicyConfig
from exprl_megatron.config.precision import PrecisionConfig
from exprl_megatron.policy.gather import gather_buckets
from exprl_megatron.policy.policy import Policy
from exprl_megatron.policy.world import enter_world, leave_world
from exprl_megatron.training.examples import ExampleReader
from exprl_megatron.utils.accelerator import uses_cuda
from on_device.compared import Compared, at_least, near

MINIATURE = Path(__file__).parents[2] / "recipes" / "miniature"
MODEL = MINIATURE / "policy"
BATCH = 32
OPTIMIZER = OptimizerConfig(lr=1e-3, betas=(0.9, 0.95))
REFERENCE_STEPS = 6

LEAST_COSINE = {"fp32": 1 - 1e-9, "bf16": 0.99, "fp8-delayed": 0.9}
"""Of a precision's first gradient with the reference's; 0.95 for other FP8 kinds, which have 0.97 emulated on a CPU.

Delayed scaling begins with scales of 1, as it has seen no amax in its first pass.
"""
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 0.02}
"""Largest relative difference of a step's loss from the reference's; 0.05 for FP8, which has 0.02 emulated on a CPU."""


@dataclass(frozen=True)
class Learned:
    """What a few steps of supervised learning showed."""

    losses: list[float]
    """Mean negative log-prob of a response token, in nats, before each step."""
    norms: list[float]
    """Global gradient norm of each step, before clipping."""
    gradient: torch.Tensor | None
    """Of the first step's loss, all Hugging Face tensors flat in the order of their names, fp32, on the CPU.

    None in a world of several ranks, where a gradient is spread over them.
    """


@cache
def batches(steps: int) -> list[list[TrainSample]]:
    """Problems of the miniature with their references as completions."""
    tree = {
        "directory": "none",
        "policy": {"model": str(MODEL), "max_tokens": 256},
        "stages": [
            {"kind": "sft", "name": "learn", "steps": steps, "problems": {"source": str(MINIATURE / "train.jsonl")}}
        ],
    }
    config = check_config(tree, "the tests on any device")
    reader = ExampleReader(config, config.stages[0])
    return [reader.batch(step + 1, BATCH) for step in range(steps)]


def policy_of(precision: PrecisionConfig, layout: Layout | None = None) -> Policy:
    """The miniature; needs a world of `layout` (of one process by default)."""
    settings = {"model": str(MODEL), "precision": precision, "layout": layout or Layout(), "max_tokens": 256}
    return Policy(PolicyConfig(**settings), seed=0)


def learn(precision: PrecisionConfig, steps: int, policy: Policy | None = None) -> Learned:
    """`steps` steps of supervised learning, the same for every precision and layout.

    In a world of its own where no policy is given.
    """
    if policy is None:
        enter_world(Layout())
        try:
            return learn(precision, steps, policy_of(precision))
        finally:
            leave_world()
    policy.begin_stage(OPTIMIZER, steps)
    losses, norms, gradient = [], [], None
    for step, batch in enumerate(batches(steps)):
        tokens = sum(len(sequence.response_ids) for sequence in batch)
        losses.append(policy.accumulate(batch, likelihood, 1.0, tokens)["loss"] / tokens)
        if step == 0 and policy.world.layout.world_size == 1:
            gradient = _gradient(policy)
        norms.append(policy.apply_update().grad_norm)
    return Learned(losses, norms, gradient)


def learn_in_layout(layout: Layout, kind: str, out: Path) -> Learned:
    """REFERENCE_STEPS steps in processes of their own, one for each rank of `layout`."""
    script = Path(__file__).with_name("learning_worker.py")
    sizes = layout.model_dump(mode="json")
    results = run_ranks(script, layout.world_size, out, torchrun=uses_cuda(), layout=sizes, precision=kind)
    return Learned(**results["learned"])


@cache
def reference() -> Learned:
    """The same steps in fp32 on the CPU, by transformers, autograd and torch's AdamW."""
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": decayed, "weight_decay": OPTIMIZER.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)
    losses, norms, gradient = [], [], None
    for batch in batches(REFERENCE_STEPS):
        loss = _loss(model, batch)
        loss.backward()
        losses.append(loss.item())
        if gradient is None:
            gradient = _flat({name: parameter.grad for name, parameter in model.named_parameters()})
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_grad_norm).item())
        optimizer.step()
        optimizer.zero_grad()
    return Learned(losses, norms, gradient)


def beside_reference(kind: str, learned: Learned) -> list[Compared]:
    """`learned`, of REFERENCE_STEPS steps or more in the precision `kind`, beside the reference."""
    expected = reference()
    tolerance = LOSS_TOLERANCE.get(kind, 0.05)
    compared = [
        near(f"{kind}: loss of step {step}", learned.losses[step - 1], expected.losses[step - 1], tolerance)
        for step in (1, 2, REFERENCE_STEPS)
    ]
    if learned.gradient is not None:
        found = cosine(learned.gradient, expected.gradient)
        compared.append(at_least(f"{kind}: cosine of step 1's gradient", found, LEAST_COSINE.get(kind, 0.95)))
    return compared


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of the angle between two gradients."""
    return float(torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=0))


def likelihood(log_probs: torch.Tensor, entropy: torch.Tensor, micro: MicroBatch):
    """The loss of supervised learning, summed over response tokens."""
    loss = -(log_probs * micro.mask).sum()
    return loss, {"loss": loss.detach()}


def _loss(model: torch.nn.Module, batch: list[TrainSample]) -> torch.Tensor:
    """Mean negative log-prob of the batch's response tokens."""
    longest = max(len(sequence) for sequence in batch)
    # Tokens behind a sequence's end are in no position's past.
    ids = torch.zeros(len(batch), longest, dtype=torch.long)  # [rows, longest]
    for row, s in zip(ids, batch, strict=True):
        row[: len(s)] = torch.as_tensor([*s.prompt_ids, *s.response_ids])
    logs = model(ids[:, :-1]).logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    places = torch.arange(1, longest)
    starts, ends = (torch.tensor(x)[:, None] for x in ([len(s.prompt_ids) for s in batch], [len(s) for s in batch]))
    responses = (places >= starts) & (places < ends)
    return -logs[responses].sum() / responses.sum()


class _Gradients:
    """In place of a model chunk: its gradients under its parameters' names."""

    def __init__(self, chunk: torch.nn.Module):
        self._named = [(name, parameter.main_grad) for name, parameter in chunk.named_parameters()]

    def named_parameters(self) -> list[tuple[str, torch.Tensor]]:
        return self._named

    def named_buffers(self) -> list[tuple[str, torch.Tensor]]:
        """None: a router's bias has no gradient."""
        return []


def _gradient(policy: Policy) -> torch.Tensor:
    """The gradient in Hugging Face form: joined from Megatron's as weights are."""
    chunks = [_Gradients(chunk) for chunk in policy.chunks]
    buckets = gather_buckets(chunks, policy.architecture, policy.world, 2**30)
    return _flat(dict(pair for bucket in buckets for pair in bucket))


def _flat(named: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([named[name].flatten().float().cpu() for name in sorted(named)])
