"""The examples do what they say; tests/training/test_extended_runs.py trains with them."""

import asyncio

import pytest
import torch

from examples.estimators import median_centered
from examples.losses import soft_gate
from examples.reward_terms import boxed, repeated_lines
from examples.verifiers import Counter, within_one_percent
from exprl_megatron.algorithms.advantages import estimator
from exprl_megatron.algorithms.batch import MicroBatch
from exprl_megatron.algorithms.objective import policy_objective
from exprl_megatron.api import Problem, SurrogateBatch, Trace
from exprl_megatron.config.losses import LossConfig
from exprl_megatron.plugins.failures import PluginError

PROBLEM = Problem("p", "How long is it, in meters?", answer="2.00")


def trace(text: str) -> Trace:
    return Trace("p", 0, (1,), (2,), (-0.5,), text, "stop", ())


@pytest.mark.parametrize(
    ("text", "value"), [("It is 2.01 m.", 1.0), ("7, no: 1.99", 1.0), ("2.03", 0.0), ("", 0.0), ("two", 0.0)]
)
def test_a_measured_value_is_right_within_one_percent(text, value):
    assert asyncio.run(within_one_percent(PROBLEM, trace(text))).value == value


def test_words_are_counted():
    problem = Problem("p", "Answer in three words.", answer="3")
    assert [Counter()(problem, trace(text)).value for text in ("one two three", "one")] == [1.0, 0.0]


def test_form_and_repetition_are_terms_of_a_reward():
    assert [boxed(PROBLEM, trace(text)) for text in ("\\boxed{1}", "\\boxed{1} \\boxed{2}", "")] == [1.0, 0.0, 0.0]
    assert repeated_lines(PROBLEM, trace("a\nb\n\na\na")) == 0.5
    assert repeated_lines(PROBLEM, trace("")) == 0.0


def test_an_estimator_of_the_users_own_computes_the_advantages_and_abstentions_have_none():
    rewards = torch.tensor([[0.0, 0.25, 1.0, 9.0], [0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)
    valid = torch.tensor([[True, True, True, False], [False] * 4])
    assert estimator("examples.estimators:median_centered")(rewards, valid).tolist() == [
        [-0.25, 0.0, 0.75, 0.0],
        [0.0] * 4,
    ]
    assert median_centered(rewards, valid)[0, :3].tolist() == [-0.25, 0.0, 0.75]


def micro(log_probs: torch.Tensor) -> MicroBatch:
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    advantages = torch.tensor([[1.0], [-0.5]]) * mask
    targets = torch.zeros(2, 3, dtype=torch.int64)
    return MicroBatch(targets, mask, advantages, None, log_probs.detach() - 0.3, None)


def test_a_loss_of_the_users_own_takes_the_surrogates_place_beside_aggregation_and_entropy():
    log_probs = torch.tensor([[-1.0, -2.0, 0.0], [-0.5, -0.1, -3.0]], requires_grad=True)
    batch = micro(log_probs)
    config = LossConfig(surrogate="examples.losses:soft_gate", dual_clip=None, kl_coefficient=0.0)
    config = config.model_copy(update={"entropy_coefficient": 0.1, "aggregation": "sequence-sum"})
    entropy = torch.full((2, 3), 0.7)
    loss, metrics = policy_objective(config)(log_probs, entropy, batch)
    # By hand: all ratios are exp(0.3); tau is 1 for the two tokens of the first trace and 1.05 for the other three.
    ratio = torch.tensor(0.3).exp()
    policy = -2 * 4 * torch.sigmoid(ratio - 1) + 0.5 * 3 * 4 * torch.sigmoid(1.05 * (ratio - 1)) / 1.05
    assert loss.item() == pytest.approx((policy - 0.1 * 0.7 * 5).item(), rel=1e-6)
    assert metrics["loss/policy"].item() == pytest.approx(policy.item(), rel=1e-6)
    assert metrics["ratio"].item() == pytest.approx(5 * ratio.item(), rel=1e-6)


def test_the_soft_gate_has_the_plain_gradient_at_a_ratio_of_one():
    log_probs = torch.tensor([[-1.0, -2.0], [-0.5, -0.1]], requires_grad=True)
    advantages = torch.tensor([[2.0, 2.0], [-1.0, -1.0]])
    soft_gate(SurrogateBatch(log_probs, log_probs.detach(), advantages, torch.ones(2, 2), 0.2, 0.2)).sum().backward()
    assert torch.allclose(log_probs.grad, -advantages)


def test_values_outside_of_the_response_do_not_count(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine_masked.py").write_text("def loss(batch): return batch.log_probs / batch.mask\n")
    log_probs = torch.full((2, 3), -1.0, requires_grad=True)
    config = LossConfig(surrogate="mine_masked:loss", dual_clip=None, kl_coefficient=0.0)
    loss, _ = policy_objective(config)(log_probs, torch.zeros(2, 3), micro(log_probs))
    assert loss.item() == pytest.approx(-5.0)


def test_a_loss_that_fails_in_a_run_is_named_with_the_users_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine_failing.py").write_text("def loss(batch):\n    return batch.advantage\n")
    config = LossConfig(surrogate="mine_failing:loss", dual_clip=None)
    log_probs = torch.zeros(2, 3)
    with pytest.raises(
        PluginError, match=r"loss\.surrogate: mine_failing:loss failed at .*py, line 2, in loss: Attrib"
    ):
        policy_objective(config)(log_probs, log_probs, micro(log_probs))
