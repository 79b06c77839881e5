"""The trainer's routers take the experts that samples carry."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.witness import (
    expectation,
    largest_difference,
    listed,
    loss_function,
    sequences,
    tokens,
    with_experts,
)
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

from exprl_megatron.algorithms.batch import TrainSample
from exprl_megatron.config.policy import OptimizerConfig, PolicyConfig
from exprl_megatron.models.routing import Routing
from exprl_megatron.policy.policy import Policy
from exprl_megatron.policy.router_replay import Replay, layer_routers

SHAPE = {"micro_batch_tokens": 40, "max_tokens": 64}


def own_choice(policy: Policy, batch: list[TrainSample]) -> list[TrainSample]:
    """`batch` with the experts that the policy's own routers choose, recorded one sequence at a time."""
    routing = Routing.of(policy.architecture)
    layers = [layer for chunk in policy.chunks for layer, _ in layer_routers(chunk)]
    routers = [router for chunk in policy.chunks for _, router in layer_routers(chunk)]
    found = []
    for sample in batch:
        for router in routers:
            router.set_router_replay_action(RouterReplayAction.RECORD)
        policy.log_probs([replace(sample, routed_experts=None)], 1.0)
        chosen = torch.stack([router.get_recorded_indices() for router in routers], dim=1)[: len(sample) - 1]
        # A layer without experts has ids that nobody reads.
        experts = np.zeros((len(sample) - 1, routing.layers, routing.top_k), routing.dtype)
        experts[:, layers] = chosen.numpy()
        found.append(replace(sample, routed_experts=experts))
        for router in routers:
            router.clear_indices()
            router.clear_router_replay_action()
    return found


def other_experts(sample: TrainSample, experts: int = 4) -> TrainSample:
    return replace(sample, routed_experts=(sample.routed_experts + 1) % experts)


@pytest.fixture(params=["qwen3-moe", "mixtral", "glm4-moe"])
def model(request, tiny_model):
    return tiny_model(request.param)


def make(model, **settings) -> Policy:
    return Policy(PolicyConfig(model=str(model), **SHAPE | settings), seed=1)


@pytest.mark.parametrize("packing", [True, False])
def test_the_policys_own_choice_changes_nothing_and_other_experts_change_log_probs(world, model, packing):
    policy = make(model, packing=packing)
    batch = own_choice(policy, sequences(policy.architecture.vocabulary))
    plain = policy.log_probs([replace(sample, routed_experts=None) for sample in batch], 1.0)
    replayed = policy.log_probs(batch, 1.0)
    # Padding goes to other experts, and products of another number of rows round otherwise.
    assert largest_difference(listed(replayed), listed(plain)) < 1e-5
    others = policy.log_probs([other_experts(sample) for sample in batch], 1.0)
    assert largest_difference(listed(others), listed(plain)) > 0.1
    # One sequence after the other: each has its own rows, wherever it is in the batch.
    for index in (0, 3, 6):
        mixed = [other_experts(sample) if i == index else sample for i, sample in enumerate(batch)]
        changed = [not np.allclose(a, b, atol=1e-5) for a, b in zip(policy.log_probs(mixed, 1.0), plain, strict=True)]
        assert changed == [i == index for i in range(len(batch))]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(
    ("family", "normalised"),
    [("mixtral", {}), ("qwen3-moe", {"norm_topk_prob": False}), ("glm4-moe", {}), ("qwen3.5-moe", {})],
)
def test_with_any_experts_a_step_is_that_of_transformers_with_the_same(world, tiny_model, family, normalised, packing):
    path = tiny_model(family, layers=3, **normalised)
    policy = make(path, packing=packing)
    batch = with_experts(sequences(policy.architecture.vocabulary), layers=3, experts=4, top_k=2)
    expected = expectation(path, batch, 0.7)
    assert largest_difference(listed(policy.log_probs(batch, 0.7)), expected["log_probs"]) <= 1e-4
    policy.begin_stage(OptimizerConfig(lr=1e-2), total_steps=1)
    found = policy.accumulate(batch, loss_function, 0.7, tokens(batch))
    assert found["loss"] == pytest.approx(expected["loss"], rel=2e-5)
    assert policy.apply_update().grad_norm == pytest.approx(expected["grad_norm"], rel=2e-5)


def test_a_row_belongs_to_its_token(world, model):
    """Other experts for one token change the log-probs of the tokens that come after it, and of no earlier one."""
    policy = make(model)
    (sample,) = own_choice(policy, [TrainSample((3, 4, 5), tuple(range(10, 20)))])
    plain = policy.log_probs([sample], 1.0)[0]
    for row in (2, 6, 11):
        experts = sample.routed_experts.copy()
        experts[row] = (experts[row] + 1) % 4
        found = policy.log_probs([replace(sample, routed_experts=experts)], 1.0)[0]
        changed = np.abs(found - plain) > 1e-5
        # Row 2 is the prompt's last token, which predicts the first of the response.
        assert not changed[: row - 2].any() and changed[row - 2]


def test_each_layer_takes_its_own_experts(world, tiny_model):
    policy = make(tiny_model("qwen3-moe", layers=3))
    batch = own_choice(policy, sequences(policy.architecture.vocabulary, count=2))
    routers = [router for chunk in policy.chunks for _, router in layer_routers(chunk)]
    seen = []
    for router in routers:
        original = router.get_replay_topk
        router.get_replay_topk = lambda *a, o=original, **k: seen.append(o(*a, **k)[1]) or o(*a, **k)
    policy.log_probs(batch[:1], 1.0)
    count = len(batch[0]) - 1
    assert np.array_equal(torch.stack(seen, 1)[:count].numpy(), batch[0].routed_experts)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_step_on_the_policys_own_choice_is_that_without_it_and_gradients_reach_the_router(world, model, recompute):
    policy = make(model, recompute=recompute)
    chosen = own_choice(policy, sequences(policy.architecture.vocabulary, count=4))

    def step(policy: Policy, batch: list[TrainSample]) -> tuple[float, float, torch.Tensor]:
        policy.begin_stage(OptimizerConfig(lr=1e-2), total_steps=1)
        loss = policy.accumulate(batch, loss_function, 0.7, tokens(batch))["loss"]
        (router, *_) = (p for name, p in policy.chunks[0].named_parameters() if "router.weight" in name)
        gradient = router.main_grad.clone()
        return loss, policy.apply_update().grad_norm, gradient

    plain = step(policy, [replace(sample, routed_experts=None) for sample in chosen])
    replayed = step(make(model, recompute=recompute), chosen)
    others = step(make(model, recompute=recompute), [other_experts(sample) for sample in chosen])
    assert replayed[:2] == pytest.approx(plain[:2], rel=1e-5)
    assert torch.allclose(replayed[2], plain[2], atol=1e-6)
    assert replayed[2].abs().max() > 1e-4
    assert others[1] != pytest.approx(plain[1], rel=1e-3) and others[2].abs().max() > 1e-4


def test_layers_that_are_computed_again_take_the_choice_of_their_own_micro_batch(world, tiny_model):
    """A pipeline takes the second micro-batch forward before the first one goes back."""
    policy = make(tiny_model("mixtral"), recompute="full")
    (chunk,) = policy.chunks
    scores, draw = torch.randn(5, 4), torch.Generator().manual_seed(0)
    choices = [torch.rand(5, 2, 4, generator=draw).argsort(-1)[..., :2] for _ in range(3)]

    def chosen() -> torch.Tensor:
        take = lambda scores, top_k, *_, **__: scores.topk(top_k)  # noqa: E731
        taken = [router.get_replay_topk(scores, 2, default_compute_topk=take)[1] for _, router in layer_routers(chunk)]
        return torch.stack(taken, dim=1)

    replay = Replay(policy.chunks, recomputes=True)
    for experts in choices:
        with replay.forward(chunk, experts):
            assert torch.equal(chosen(), experts)
    for experts in choices:
        assert torch.equal(chosen(), experts)
    replay.end()
    assert torch.equal(chosen(), scores.topk(2).indices[:, None].expand(5, 2, 2))


def test_routers_choose_for_themselves_before_and_after_and_where_the_config_says_so(world, model):
    policy = make(model)
    batch = own_choice(policy, sequences(policy.architecture.vocabulary))
    plain = listed(policy.log_probs([replace(sample, routed_experts=None) for sample in batch], 1.0))
    wrong = [other_experts(sample) for sample in batch]
    assert largest_difference(listed(policy.log_probs(wrong, 1.0)), plain) > 0.1
    assert listed(policy.log_probs([replace(sample, routed_experts=None) for sample in batch], 1.0)) == plain
    assert listed(make(model, router_replay=False).log_probs(wrong, 1.0)) == plain


def test_the_reference_policy_chooses_for_itself(world, model):
    policy = make(model)
    policy.begin_stage(OptimizerConfig(lr=1e-2), total_steps=1, keep_ref_policy=True)
    batch = own_choice(policy, sequences(policy.architecture.vocabulary))
    wrong = [other_experts(sample) for sample in batch]
    plain = listed(policy.log_probs([replace(sample, routed_experts=None) for sample in batch], 1.0))
    assert listed(policy.log_probs(wrong, 1.0, ref_policy=True)) == plain
    assert largest_difference(listed(policy.log_probs(wrong, 1.0)), plain) > 0.1


def test_a_second_model_in_the_process_and_one_that_was_built_again_are_not_in_the_way(world, model):
    """Megatron's own list has the routers of all of them."""
    first = make(model)
    batch = own_choice(first, sequences(first.architecture.vocabulary))
    plain = listed(first.log_probs(batch, 1.0))
    second = make(model)
    wrong = [other_experts(sample) for sample in batch]
    changed = listed(second.log_probs(wrong, 1.0))
    assert largest_difference(changed, plain) > 0.1
    assert listed(first.log_probs(batch, 1.0)) == plain
    for overlapped in (False, True):
        first.begin_stage(OptimizerConfig(overlap=overlapped), total_steps=1)
        assert listed(first.log_probs(wrong, 1.0)) == changed
    assert RouterReplay.global_router_replay_instances == []


def test_a_batch_of_which_only_some_have_their_experts_is_refused(world, tiny_model):
    policy = make(tiny_model("mixtral"))
    batch = own_choice(policy, sequences(policy.architecture.vocabulary))
    batch[2] = replace(batch[2], routed_experts=None)
    with pytest.raises(ValueError, match="routed_experts is given for some samples of a batch and missing for others"):
        policy.log_probs(batch, 1.0)
