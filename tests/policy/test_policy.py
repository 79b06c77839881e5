"""One process: what a stage of learning does; layouts are the matter of test_layouts.py."""

import gc
import math
import weakref

import pytest
import torch
from helpers.witness import listed, loss_function, sequences, tokens
from transformers import AutoModelForCausalLM, Trainer

from exprl_megatron.algorithms.batch import TrainSample
from exprl_megatron.config.policy import Layout, OptimizerConfig, PolicyConfig
from exprl_megatron.errors import GradientNotFinite, UserError
from exprl_megatron.models.flops import sequence_flops
from exprl_megatron.policy import overlap
from exprl_megatron.policy.optimizer import build_optimizer, set_learning_rates
from exprl_megatron.policy.packing import plan_micro_batches
from exprl_megatron.policy.policy import Policy


@pytest.fixture
def policy(tiny_model, world) -> Policy:
    config = PolicyConfig(model=str(tiny_model("qwen2")), max_tokens=40, micro_batch_tokens=64, log_prob_chunk=8)
    return Policy(config, seed=0)


BATCH = sequences(128)
ADAM = OptimizerConfig(lr=1e-2)


def step(policy: Policy, loss=loss_function):
    policy.accumulate(BATCH, loss, 1.0, tokens(BATCH))
    return policy.apply_update()


def weights(policy: Policy) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in policy.chunks[0].parameters()]


def test_the_same_steps_give_the_same_bits(policy, tiny_model):
    again = Policy(policy.config, seed=0)
    for learner in (policy, again):
        learner.begin_stage(ADAM, total_steps=3)
        step(learner), step(learner)
    assert all(torch.equal(a, b) for a, b in zip(weights(policy), weights(again), strict=True))


@pytest.mark.parametrize("overlap", [False, True], ids=["the same buffers", "others"])
def test_what_the_former_stage_held_is_free_before_the_next_one_takes_memory(policy, monkeypatch, overlap):
    # As a trainer process does before its first stage: the model is then left out of collections.
    gc.freeze()
    policy.begin_stage(ADAM, total_steps=1)
    step(policy)
    (part,) = policy.stage.optimizer.chained_optimizers
    moments = [weakref.ref(state["exp_avg"]) for state in part.optimizer.state.values()]
    gradients = weakref.ref(policy.wrapped[0].buffers[0].grad_data)
    model = weakref.ref(policy.chunks[0])
    expected, held = weights(policy), []
    del part
    gc.disable()
    monkeypatch.setattr(
        "exprl_megatron.policy.policy.build_optimizer",
        lambda *arguments: held.extend([*(ref() for ref in moments), gradients()]) or build_optimizer(*arguments),
    )
    policy.begin_stage(ADAM.model_copy(update={"overlap": overlap}), total_steps=1)
    gc.enable()
    assert moments and all(one is None for one in held[:-1])
    assert (held[-1] is None) == (model() is None) == overlap
    assert all(torch.equal(a, b) for a, b in zip(weights(policy), expected, strict=True))


@pytest.mark.parametrize("all_decay", [False, True])
def test_a_step_is_adamw_with_clipping_and_without_decay_of_norms_and_biases_unless_they_shall(policy, all_decay):
    settings = OptimizerConfig(lr=1e-2, weight_decay=0.1, clip_grad_norm=0.5, decay_norms_and_biases=all_decay)
    policy.begin_stage(settings, total_steps=2)
    before = {name: p.detach().clone() for name, p in policy.chunks[0].named_parameters()}
    policy.accumulate(BATCH, loss_function, 1.0, tokens(BATCH))
    gradients = {name: p.main_grad.clone() for name, p in policy.chunks[0].named_parameters()}
    update = policy.apply_update()
    norm = sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5
    assert update.grad_norm == pytest.approx(norm)
    for name, parameter in policy.chunks[0].named_parameters():
        gradient = gradients[name] * (0.5 / norm)
        # The first AdamW step: bias-corrected moments are the gradient and its square.
        expected = before[name] * (1 - 1e-2 * (0.1 if parameter.dim() > 1 or all_decay else 0))
        expected = expected - 1e-2 * gradient / (gradient.abs() + 1e-8)
        assert torch.allclose(parameter, expected, atol=1e-5), name


@pytest.mark.parametrize("distributed", [True, False])
def test_a_scaled_gradient_is_that_of_another_denominator(policy, distributed):
    settings, found = OptimizerConfig(lr=1e-2, eps=1e-2, clip_grad_norm=1e6, distributed=distributed), []
    before = policy.chunks[0].state_dict_for_save_checkpoint()
    before = {name: value.clone() for name, value in before.items() if torch.is_tensor(value)}
    for denominator, scale in ((4.0, 1.0), (8.0, 2.0), (2.0, 0.5)):
        policy.chunks[0].load_state_dict(before, strict=False)
        policy.begin_stage(settings, total_steps=1)
        policy.accumulate(BATCH, loss_function, 1.0, denominator)
        norm = policy.apply_update(gradient_scale=scale).grad_norm
        found.append((norm, weights(policy)))
    (norm, unscaled), *scaled = found
    for of_scaled, learned in scaled:
        assert of_scaled == pytest.approx(norm, rel=1e-6)
        assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(unscaled, learned, strict=True))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3-moe"])
def test_what_does_not_decay_is_what_the_trainer_of_transformers_leaves_out(tiny_model, world, family):
    model = AutoModelForCausalLM.from_pretrained(tiny_model(family))
    theirs = set(Trainer.get_decay_parameter_names(None, model))
    left_out = sum(p.numel() for name, p in model.named_parameters() if name not in theirs)
    learner = Policy(PolicyConfig(model=str(tiny_model(family)), max_tokens=40), seed=0)
    for all_decay, expected in ((False, left_out), (True, 0)):
        settings = OptimizerConfig(weight_decay=0.1, decay_norms_and_biases=all_decay, distributed=False)
        optimizer = build_optimizer(settings, overlap.wrap(learner.chunks, settings))
        set_learning_rates(optimizer, settings, 1.0)
        groups = [group for group in optimizer.param_groups if group["weight_decay"] == 0]
        assert sum(parameter.numel() for group in groups for parameter in group["params"]) == expected


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3-moe", "mixtral"])
def test_packed_sequences_have_the_loss_and_the_gradient_of_padded_ones(tiny_model, world, family):
    found = {}
    for packing in (True, False):
        config = PolicyConfig(model=str(tiny_model(family)), max_tokens=64, micro_batch_tokens=64, packing=packing)
        learner = Policy(config, seed=0)
        learner.begin_stage(ADAM, total_steps=1)
        loss = learner.accumulate(BATCH, loss_function, 1.0, tokens(BATCH))["loss"]
        found[packing] = loss, {name: p.main_grad for name, p in learner.chunks[0].named_parameters()}
    (loss, gradients), (expected, padded) = found[True], found[False]
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, gradient in padded.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_a_new_stage_has_a_fresh_optimizer_on_the_current_weights(policy):
    policy.begin_stage(ADAM, total_steps=2)
    step(policy)
    learned = weights(policy)
    policy.begin_stage(OptimizerConfig(lr=5e-3, schedule="linear"), total_steps=2, keep_ref_policy=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(policy), learned, strict=True))
    assert [step(policy).learning_rate for _ in range(2)] == [5e-3, 2.5e-3]


def test_a_stage_may_change_the_kind_of_optimizer(policy):
    policy.begin_stage(ADAM, total_steps=2)
    step(policy)
    learned = listed(policy.log_probs(BATCH, 1.0))
    policy.begin_stage(OptimizerConfig(lr=1e-2, distributed=False), total_steps=2)
    assert listed(policy.log_probs(BATCH, 1.0)) == learned
    step(policy)
    assert listed(policy.log_probs(BATCH, 1.0)) != learned


def test_offloading_the_optimizer_is_refused_where_there_is_no_gpu_to_take_it_from(policy):
    with pytest.raises(UserError, match=r"optimizer\.offload is 0\.5, but on a machine without GPU .*; set it to 0"):
        policy.begin_stage(OptimizerConfig(offload=0.5), total_steps=2)


def test_starting_weights_are_kept_while_the_policy_learns(policy):
    before = listed(policy.log_probs(BATCH, 0.9))
    policy.begin_stage(ADAM, total_steps=2, keep_ref_policy=True)
    step(policy)
    after = listed(policy.log_probs(BATCH, 0.9))
    assert listed(policy.log_probs(BATCH, 0.9, ref_policy=True)) == before
    assert listed(policy.log_probs(BATCH, 0.9)) == after != before


def test_gradients_wait_for_apply_update_and_are_gone_after_it(policy):
    policy.begin_stage(ADAM, total_steps=9)
    whole = policy.accumulate(BATCH, loss_function, 1.0, tokens(BATCH))
    policy.accumulate(BATCH, lambda *a: (-loss_function(*a)[0], {}), 1.0, tokens(BATCH))
    assert policy.apply_update().grad_norm == pytest.approx(0.0, abs=1e-4)
    assert whole["loss"] != 0


def test_an_update_tells_its_share_of_padding_packed_and_padded(policy):
    """In fp32 on one rank a packed row has none; one micro-batch of all is as wide as its longest sequence."""
    policy.config = policy.config.model_copy(update={"micro_batch_tokens": 1000})
    policy.begin_stage(ADAM, total_steps=9)
    found = policy.accumulate(BATCH, loss_function, 1.0, tokens(BATCH))
    lengths = [len(sequence) for sequence in BATCH]
    assert found["padding/padded"] == pytest.approx(1 - sum(lengths) / (len(lengths) * max(lengths)))
    assert found["padding/packed"] == 0.0


def test_micro_batches_are_planned_once_for_all_passes_of_a_step(policy, monkeypatch):
    planned = []

    def plan(lengths, **limits):
        planned.append(limits["shape"].packed)
        return plan_micro_batches(lengths, **limits)

    monkeypatch.setattr("exprl_megatron.policy.policy.plan_micro_batches", plan)
    policy.config = policy.config.model_copy(update={"micro_batch_tokens": 77})
    policy.begin_stage(ADAM, total_steps=9, keep_ref_policy=True)
    listed(policy.log_probs(BATCH, 1.0, ref_policy=True))
    listed(policy.log_probs(BATCH, 1.0))
    step(policy)
    # The padded plan is what the share of padding without packing is computed from.
    assert planned == [True, False]


def test_micro_batches_are_balanced_by_the_operations_of_the_model(policy, monkeypatch):
    planned = []

    def plan(lengths, **limits):
        planned.append(limits["work"])
        return plan_micro_batches(lengths, **limits)

    monkeypatch.setattr("exprl_megatron.policy.policy.plan_micro_batches", plan)
    # Sizes that no other test plans for.
    policy.config = policy.config.model_copy(update={"micro_batch_tokens": 78})
    listed(policy.log_probs(BATCH, 1.0))
    assert planned == [tuple(sequence_flops(policy.architecture, map(len, BATCH)))]


def test_a_gradient_that_is_not_finite_stops_the_run_with_the_weights_as_they_were(policy):
    policy.begin_stage(ADAM, total_steps=2)
    before = weights(policy)

    def broken(log_probs, entropy, micro):
        return log_probs.sum() * float("nan"), {}

    with pytest.raises(GradientNotFinite, match="gradient norm of update 1 is nan"):
        step(policy, broken)
    assert all(torch.equal(a, b) for a, b in zip(weights(policy), before, strict=True))
    # Nothing of it is left in the next update.
    assert math.isfinite(step(policy).grad_norm)


def test_a_sequence_longer_than_the_config_allows_is_refused(policy):
    with pytest.raises(UserError, match=r"has 41 tokens, more than policy.max_tokens \(40\)"):
        policy.log_probs([TrainSample((1,) * 20, (2,) * 21)], 1.0)


def test_a_sequence_without_prompt_is_an_error(policy):
    with pytest.raises(ValueError, match="has no prompt"):
        policy.log_probs([TrainSample((), (2, 3))], 1.0)


def test_no_sequences_have_no_log_probs(policy):
    assert policy.log_probs([], 1.0) == []


def test_learning_outside_a_stage_is_an_error(policy):
    with pytest.raises(RuntimeError, match="call begin_stage first"):
        policy.apply_update()


def test_a_policy_of_another_layout_than_the_worlds_is_an_error(policy):
    with pytest.raises(RuntimeError, match="not in that of"):
        Policy(policy.config.model_copy(update={"layout": Layout(tp=2)}), seed=0)


def test_bf16_learns_with_fp32_main_weights(tiny_model, world):
    policy = Policy(PolicyConfig(model=str(tiny_model("qwen3")), max_tokens=40, precision="bf16"), seed=0)
    policy.begin_stage(OptimizerConfig(lr=1e-5), total_steps=9)
    before = weights(policy)
    losses = [policy.accumulate(BATCH, loss_function, 1.0, tokens(BATCH))["loss"], step(policy)]
    assert losses[1].grad_norm > 0
    assert {parameter.dtype for parameter in before} == {torch.bfloat16}
    main = [p for group in policy.stage.optimizer.param_groups for p in group["params"]]
    assert {parameter.dtype for parameter in main} == {torch.float32}
