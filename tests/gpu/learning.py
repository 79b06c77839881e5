"""The miniature learning its training problems' solutions, in any precision: what the precisions are compared by."""

from dataclasses import dataclass
from pathlib import Path

import torch

from exprl_megatron.config.load import check_config
from exprl_megatron.config.policy import OptimizerConfig, PolicyConfig
from exprl_megatron.config.precision import PrecisionConfig
from exprl_megatron.policy.batch import MicroBatch, Sequence
from exprl_megatron.policy.policy import Policy
from exprl_megatron.policy.world import enter_world, leave_world
from exprl_megatron.training.examples import ExampleReader

MINIATURE = Path(__file__).parents[2] / "recipes" / "miniature"
BATCH = 32


@dataclass(frozen=True)
class Learned:
    """What a run of `learn` showed."""

    losses: list[float]
    """Mean negative log-prob of a response token, in nats, before each step."""
    gradient: torch.Tensor
    """Of the first step's loss, all parameters one behind the other, fp32, on the CPU."""


def batches(steps: int) -> list[list[Sequence]]:
    """Problems of the miniature with their references as completions."""
    tree = {
        "directory": "none",
        "policy": {"model": str(MINIATURE / "policy"), "max_tokens": 256},
        "stages": [
            {"kind": "sft", "name": "learn", "steps": steps, "problems": {"source": str(MINIATURE / "train.jsonl")}}
        ],
    }
    config = check_config(tree, "the GPU tests")
    reader = ExampleReader(config, config.stages[0])
    return [reader.batch(step + 1, BATCH) for step in range(steps)]


def policy_of(precision: PrecisionConfig) -> Policy:
    """The miniature; needs a world of one process."""
    return Policy(PolicyConfig(model=str(MINIATURE / "policy"), precision=precision, max_tokens=256), seed=0)


def learn(precision: PrecisionConfig, steps: int, policy: Policy | None = None) -> Learned:
    """`steps` steps of supervised learning, the same for every precision.

    In a world of its own where no policy is given.
    """
    if policy is None:
        enter_world(PolicyConfig(model="none").layout)
        try:
            return learn(precision, steps, policy_of(precision))
        finally:
            leave_world()
    policy.begin_stage(OptimizerConfig(lr=1e-3, betas=(0.9, 0.95)), steps)
    losses, gradient = [], None
    for batch in batches(steps):
        tokens = sum(len(sequence.response_ids) for sequence in batch)
        losses.append(policy.accumulate(batch, _likelihood, 1.0, tokens)["loss"] / tokens)
        gradient = _gradient(policy) if gradient is None else gradient
        policy.apply_update()
    return Learned(losses, gradient)


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of the angle between two gradients."""
    return float(torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=0))


def _likelihood(log_probs: torch.Tensor, entropy: torch.Tensor, micro: MicroBatch):
    loss = -(log_probs * micro.mask).sum()
    return loss, {"loss": loss.detach()}


def _gradient(policy: Policy) -> torch.Tensor:
    parts = [parameter.main_grad.flatten().cpu() for chunk in policy.chunks for parameter in chunk.parameters()]
    return torch.cat(parts).clone()
