"""Linear layers that round as the FP8 recipes do: against torch's own FP8 product, explicit formulas and each other."""

from pathlib import Path

import pytest
import torch
from emulation_worker import KINDS
from helpers.ranks import run_ranks
from helpers.witness import largest_difference, listed, loss_function, sequences, tokens

from exprl_megatron.config.load import check_config
from exprl_megatron.config.policy import OptimizerConfig, PolicyConfig
from exprl_megatron.errors import UserError
from exprl_megatron.policy.emulation import RoundedLinear
from exprl_megatron.policy.fp8_rounding import E4M3, E5M2, Blockwise, Tensorwise, e8m0_scale, power_of_two_scale
from exprl_megatron.policy.policy import Policy

BLOCKWISE = Blockwise(128, square_weights=True, scale=power_of_two_scale)
MXFP8 = Blockwise(32, square_weights=False, scale=e8m0_scale)


def operands() -> list[torch.Tensor]:
    """Input [6, 32, 192], weight [160, 192] and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((6, 32, 192), (160, 192), (6, 32, 160))]


def three_products(rounding) -> list[torch.Tensor]:
    """Output, gradient of the input and gradient of the weight, as matrices."""
    values, weight, gradient = operands()
    values.requires_grad_(), weight.requires_grad_()
    output = RoundedLinear.apply(values, weight, rounding, True)
    output.backward(gradient)
    return [output.detach().flatten(0, 1), values.grad.flatten(0, 1), weight.grad]


def test_tensorwise_products_are_those_of_torchs_fp8_matrix_product():
    def cast(matrix, dtype):
        scale = torch.tensor(torch.finfo(dtype).max) / matrix.abs().max()
        return (matrix * scale).to(dtype), scale.reciprocal()

    def product(left, right):
        """left [m, k] x right [n, k]^T."""
        return torch._scaled_mm(left[0], right[0].T, left[1], right[1], out_dtype=torch.float32)

    def turned(operand):
        return operand[0].T.contiguous(), operand[1]

    values, weight, gradient = (operand.reshape(-1, operand.shape[-1]) for operand in operands())
    values, weight, gradient = cast(values, E4M3), cast(weight, E4M3), cast(gradient, E5M2)
    expected = [
        product(values, weight),
        product(gradient, turned(weight)),
        product(turned(gradient), turned(values)),
    ]
    for ours, theirs in zip(three_products(Tensorwise()), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("rounding", [Tensorwise(), BLOCKWISE, MXFP8])
def test_gradients_are_those_of_autograd_with_a_straight_through_rounding_of_each_product(rounding):
    """The input's and the weight's gradient come from two products, each with operands rounded its own way."""

    def rounded(operand, role, which):
        flat = operand.reshape(-1, operand.shape[-1])
        return flat + (rounding(flat, role, True)[which] - flat).detach()

    values, weight, gradient = operands()
    values.requires_grad_(), weight.requires_grad_()
    forward = rounded(values, "input", 0) @ rounded(weight, "weight", 0).T
    (of_input,) = torch.autograd.grad(
        rounded(values, "input", 1) @ rounded(weight, "weight", 1).T, values, rounded(gradient, "gradient", 0)
    )
    (of_weight,) = torch.autograd.grad(
        rounded(values, "input", 1) @ rounded(weight, "weight", 1).T, weight, rounded(gradient, "gradient", 1)
    )
    forward = forward.detach()
    for ours, theirs in zip(three_products(rounding), (forward, of_input.flatten(0, 1), of_weight), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def policy(model: Path, kind: str | None, first_last_bf16: int = 0, **settings) -> Policy:
    precision = {"kind": kind, "emulate": True, "first_last_bf16": first_last_bf16} if kind else "fp32"
    sizes = {"micro_batch_tokens": 64, "max_tokens": 64}
    return Policy(PolicyConfig(model=str(model), precision=precision, **sizes, **settings), seed=0)


def learnt(learner: Policy) -> tuple[list[float], list[list[float]]]:
    """Gradient norms of three steps, and the log-probs after them."""
    batch = sequences(learner.architecture.vocabulary)
    learner.begin_stage(OptimizerConfig(lr=1e-3, eps=1e-5), total_steps=3)
    norms = []
    for _ in range(3):
        learner.accumulate(batch, loss_function, 1.0, tokens(batch))
        norms.append(learner.apply_update().grad_norm)
    return norms, listed(learner.log_probs(batch, 1.0))


def log_probs(learner: Policy) -> list[list[float]]:
    return listed(learner.log_probs(sequences(learner.architecture.vocabulary), 1.0))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_round_the_first_and_last_ones_do_not_where_the_config_says_so(tiny_model, world, kind):
    model = tiny_model("qwen3", layers=4)
    exact = log_probs(policy(model, None))
    gaps = [largest_difference(log_probs(policy(model, kind, kept)), exact) for kept in (0, 1, 2)]
    assert gaps[0] > 1e-3 and gaps[1] > 1e-3
    assert gaps[2] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_rounded_model_learns_the_same_with_its_activations_recomputed(tiny_model, world, kind):
    model = tiny_model("qwen2")
    assert learnt(policy(model, kind)) == learnt(policy(model, kind, recompute="full"))


@pytest.mark.parametrize("kind", KINDS)
def test_rounded_gradients_are_near_the_exact_ones(tiny_model, world, kind):
    model = tiny_model("llama")
    (_, *exact), _ = learnt(policy(model, None))
    # The first pass of delayed scaling knows no amax yet.
    (_, *rounded), _ = learnt(policy(model, kind))
    assert rounded == pytest.approx(exact, rel=0.1)
    assert rounded != exact


def test_forward_passes_that_do_not_train_leave_delayed_scaling_as_it_is(tiny_model, world):
    learner = policy(tiny_model("qwen3"), "fp8-delayed")
    before = log_probs(learner)
    assert log_probs(learner) == before
    batch = sequences(learner.architecture.vocabulary)
    learner.begin_stage(OptimizerConfig(lr=1e-12), total_steps=1)
    learner.accumulate(batch, loss_function, 1.0, tokens(batch))
    assert log_probs(learner) != before


def test_emulation_adds_nothing_to_what_a_checkpoint_holds(tiny_model, world):
    model = tiny_model("qwen2")
    rounded, exact = (policy(model, kind).chunks[0].state_dict() for kind in ("fp8-delayed", None))
    assert list(rounded) == list(exact)


@pytest.mark.parametrize(
    ("precision", "policy_settings", "sentence"),
    [
        ({"kind": "bf16"}, {}, "policy.precision.emulate has nothing to emulate for bf16; choose an fp8 kind."),
        (
            {"kind": "mxfp8", "fp8_attention": True},
            {},
            "policy.precision.fp8_attention is not emulated; turn it or emulate off.",
        ),
        (
            {"kind": "fp8-delayed"},
            {"recompute": "full", "layout": {"pp": 2}},
            "policy.precision fp8-delayed is not emulated with recompute full and pp of 2 or more, as the repeated "
            "forward pass would find newer scales; choose another recompute, kind or pp.",
        ),
    ],
)
def test_what_cannot_be_emulated_is_refused(precision, policy_settings, sentence):
    tree = {
        "directory": "out",
        "policy": {"model": "model", "precision": precision | {"emulate": True}, **policy_settings},
        "stages": [{"kind": "sft", "name": "sft", "steps": 1, "examples": "examples.jsonl"}],
    }
    with pytest.raises(UserError) as caught:
        check_config(tree, "here")
    assert f"here: {sentence}" in str(caught.value).splitlines()


@pytest.fixture(scope="module")
def layouts(tiny_model, tmp_path_factory) -> dict:
    """A model whose shards are multiples of 128 in every direction."""
    model = tiny_model("qwen3", hidden=512)
    out = tmp_path_factory.mktemp("emulation")
    return run_ranks(Path(__file__).with_name("emulation_worker.py"), 2, out, model=model)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["TP2", "TP2+SP"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_does_not_depend_on_the_layout_where_its_scales_do_not(layouts, kind, layout):
    """Ranks share delayed scaling's amax and blocks lie within a shard; tensorwise scales are a shard's own."""
    low, high = (1e-3, 0.1) if kind == "fp8-tensorwise" else (0.0, 1e-5)
    found = layouts[f"mlp {layout}"][kind]
    assert low <= found["output"] <= high and low <= found["input"] <= high
    assert found["weights"] <= high


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["TP2", "TP2+SP"])
def test_a_whole_model_learns_alike_in_every_layout(layouts, layout):
    """Not to fp32's rounding: that now and then moves a number over the edge between two of 8 bits."""
    reference, result = (layouts[f"policy {name}"] for name in ("TP1", layout))
    for name in ("loss", "grad_norm", "second", "second_grad_norm"):
        assert result[name] == pytest.approx(reference[name], rel=2e-3), name
