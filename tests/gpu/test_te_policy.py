"""The same policy on a CUDA device, with Transformer Engine's layers."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers

from exprl_megatron.algorithms.batch import MicroBatch, TrainSample
from exprl_megatron.config.policy import Layout, OptimizerConfig, PolicyConfig

pytestmark = pytest.mark.gpu

BATCH = [TrainSample((5, 6, 7), tuple(range(10, 30))), TrainSample((9,), tuple(range(40, 45)))]
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8, "beta_fast": 2.0, "beta_slow": 0.5}
TOKENS = sum(len(sequence.response_ids) for sequence in BATCH)


@pytest.fixture
def world() -> Iterator:
    from exprl_megatron.policy.world import enter_world, leave_world

    yield enter_world(Layout())
    leave_world()


def likelihood(log_probs: torch.Tensor, entropy: torch.Tensor, micro: MicroBatch):
    loss = -(log_probs * micro.mask).sum()
    return loss, {"loss": loss.detach()}


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "qwen3-moe", "mixtral", "mistral", "seed-oss", "glm4-moe", "olmo3"]
)
def test_a_step_on_transformer_engines_layers_agrees_with_transformers(
    tiny_model: Callable[..., Path], world, table, family: str
):
    from exprl_megatron.policy.policy import Policy

    # Mistral is Llama, so here it is the family whose positions are stretched.
    tied = family not in ("qwen3-moe", "mixtral", "glm4-moe", "olmo3")
    directory = tiny_model(family, tied=tied, rope=YARN if family == "mistral" else None)
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).cuda()
    expected = []
    for sequence in BATCH:
        tokens = torch.tensor([sequence.token_ids.tolist()], device="cuda")
        with torch.no_grad():
            logs = reference(tokens).logits[0, len(sequence.prompt_ids) - 1 : -1].float().log_softmax(-1)
        expected.append(logs.gather(1, tokens[0, len(sequence.prompt_ids) :, None])[:, 0].tolist())

    policy = Policy(PolicyConfig(model=str(directory), precision="bf16", max_tokens=64), seed=0)
    assert type(policy.chunks[0].decoder.layers[0].self_attention.linear_qkv).__name__.startswith("TE")
    found = policy.log_probs(BATCH, 1.0)
    differences = [abs(a - b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True)]
    difference = sum(differences) / len(differences)
    table(f"{family}, bf16: mean |log-prob - transformers'|", f"{difference:.4f}", "below 0.05")
    assert difference < 0.05

    policy.begin_stage(OptimizerConfig(lr=1e-3), total_steps=3)
    losses = []
    for _ in range(3):
        losses.append(policy.accumulate(BATCH, likelihood, 1.0, TOKENS)["loss"] / TOKENS)
        assert policy.apply_update().grad_norm > 0
    assert losses[0] == pytest.approx(-sum(map(sum, expected)) / TOKENS, abs=0.05)
    assert losses[2] < losses[0]


def test_exported_weights_are_those_that_went_in(tiny_model: Callable[..., Path], world, tmp_path: Path):
    from exprl_megatron.policy.policy import Policy

    directory = tiny_model("qwen3")
    policy = Policy(PolicyConfig(model=str(directory), precision="bf16", max_tokens=64), seed=0)
    policy.save_huggingface(tmp_path / "out")
    before = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).state_dict()
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("offload", [0.5, 1.0])
def test_an_optimizer_in_host_memory_takes_the_same_steps(
    tiny_model: Callable[..., Path], world, table, offload: float
):
    from exprl_megatron.policy.policy import Policy

    policies = [Policy(PolicyConfig(model=str(tiny_model("qwen3")), precision="bf16"), seed=0) for _ in range(2)]
    for policy, share in zip(policies, (0.0, offload), strict=True):
        policy.begin_stage(OptimizerConfig(lr=1e-2, eps=1e-5, offload=share), total_steps=3)
    for _ in range(3):
        losses = [policy.accumulate(BATCH, likelihood, 1.0, TOKENS)["loss"] for policy in policies]
        norms = [policy.apply_update().grad_norm for policy in policies]
        assert losses[0] == pytest.approx(losses[1], rel=1e-2)
        assert norms[0] == pytest.approx(norms[1], rel=2e-2)
    what = f"{offload:.0%} of the optimizer on the host: loss of step 3"
    table(what, f"{losses[1]:.4f}", f"{losses[0]:.4f} within 1 %")
    devices = {
        state["exp_avg"].device.type
        for part in policies[1].stage.optimizer.chained_optimizers
        for state in part.optimizer.state.values()
    }
    assert devices == ({"cpu"} if offload == 1.0 else {"cpu", "cuda"})
