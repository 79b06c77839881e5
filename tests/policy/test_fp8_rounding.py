"""Rounding against torch's casts, plain loops, SGLang's quantizers and closed forms."""

import ast
import importlib.util
import math
from pathlib import Path

import pytest
import torch

from exprl_megatron.policy.fp8_rounding import (
    E4M3,
    E5M2,
    Blockwise,
    Delayed,
    Tensorwise,
    cast_round_trip,
    e8m0_scale,
    power_of_two_scale,
    round_blocks,
    scale_of_amax,
)

BLOCKWISE = Blockwise(128, square_weights=True, scale=power_of_two_scale)
MXFP8 = Blockwise(32, square_weights=False, scale=e8m0_scale)
RECIPES = {"tensorwise": Tensorwise(), "blockwise": BLOCKWISE, "mxfp8": MXFP8}


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spiky(*shape: int) -> torch.Tensor:
    """Gaussian, with one number in 4096 ten million times larger."""
    values = gaussian(*shape)
    values.view(-1)[::4096] *= 1e7
    return values


def from_sglang(*names: str) -> dict:
    """Functions out of SGLang's fp8_utils, of which nothing else is run: to import it takes a GPU's libraries."""
    package = Path(importlib.util.find_spec("sglang").origin).parent
    tree = ast.parse((package / "srt/layers/quantization/fp8_utils.py").read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    space = {"torch": torch, "fp8_dtype": E4M3, "_is_fp8_fnuz": False, "ceil_align": lambda n, m: -(-n // m) * m}
    future = "from __future__ import annotations\n"
    exec(compile(future + ast.unparse(tree), "fp8_utils", "exec"), space)
    return space


@pytest.mark.parametrize(("role", "dtype", "largest"), [("input", E4M3, 448), ("gradient", E5M2, 57344)])
def test_tensorwise_is_torchs_cast_of_the_tensor_scaled_to_the_formats_largest(role, dtype, largest):
    values = gaussian(37, 53)
    scale = torch.tensor(float(largest)) / values.abs().max()
    expected = (values * scale).to(dtype).float() * (1 / scale)
    for rounded in Tensorwise()(values, role, training=True):
        assert torch.equal(rounded, expected)


def test_tensorwise_agrees_with_sglangs_quantizer_bit_for_bit():
    values = gaussian(64, 96)
    quantized, inverse = from_sglang("input_to_float8")["input_to_float8"](values)
    assert torch.equal(Tensorwise()(values, "weight", training=False)[0], quantized.float() * inverse)


def test_square_blocks_agree_with_sglangs_quantizer_bit_for_bit_also_at_the_edges():
    values = gaussian(200, 300) * torch.logspace(-3, 3, 300)
    quantized, inverse = from_sglang("per_block_cast_to_fp8", "ceil_to_ue8m0")["per_block_cast_to_fp8"](values)
    spread = inverse.repeat_interleave(128, 0).repeat_interleave(128, 1)[:200, :300]
    assert torch.equal(BLOCKWISE(values, "weight", training=False)[0], quantized.float() * spread)


def looped(values: torch.Tensor, height: int, width: int, exponent_of) -> torch.Tensor:
    """Block after block in Python floats (which are fp64), with torch for the cast alone."""
    result = torch.empty_like(values)
    for top in range(0, values.shape[0], height):
        for left in range(0, values.shape[1], width):
            block = values[top : top + height, left : left + width]
            scale = 2.0 ** exponent_of(float(block.abs().max()))
            cast = (block.double() * scale).float().clamp(-448, 448).to(E4M3)
            result[top : top + height, left : left + width] = (cast.double() / scale).float()
    return result


@pytest.mark.parametrize("recipe", ["blockwise", "mxfp8"])
@pytest.mark.parametrize("role", ["input", "gradient", "weight"])
def test_blocks_are_those_of_a_plain_loop_for_both_products(recipe, role):
    values = gaussian(150, 200) * torch.logspace(-4, 4, 200)
    length = {"blockwise": 128, "mxfp8": 32}[recipe]
    exponents = {
        "blockwise": lambda amax: math.floor(math.log2(448 / amax)),
        "mxfp8": lambda amax: -math.ceil(math.log2(amax / 448)),
    }
    square = recipe == "blockwise" and role == "weight"
    over_columns, over_rows = RECIPES[recipe](values, role, training=True)
    shapes = [(length, length)] * 2 if square else [(1, length), (length, 1)]
    for rounded, shape in zip((over_columns, over_rows), shapes, strict=True):
        assert torch.equal(rounded, looped(values, *shape, exponents[recipe]))


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_second_rounding_is_made_for_training_alone(recipe):
    assert RECIPES[recipe](gaussian(4, 4), "input", training=False)[1] is None


def test_scales_are_transformer_engines_at_the_extremes():
    """As compute_scale_from_amax of its common/recipe/recipe_common.cuh says."""
    amax = torch.tensor([0.0, float("inf"), float("nan"), 1e-38, 3.0, 448.0, 449.0])
    largest = torch.finfo(torch.float32).max
    plain = [1.0, 1.0, 1.0, largest, float(torch.tensor(448.0) / 3), 1.0, float(torch.tensor(448.0) / 449)]
    assert scale_of_amax(amax, E4M3).tolist() == plain
    assert power_of_two_scale(amax, E4M3).tolist() == [1.0, 1.0, 1.0, 2.0**127, 128.0, 1.0, 0.5]


def test_mx_scales_are_powers_of_two_of_eight_bits():
    """As float_to_e8m0 of its common/util says: rounded up, 2^-127 to 2^127, what is no number stays so."""
    amax = torch.tensor([0.0, float("inf"), 1e-45, 3.0, 448.0, 449.0, 3e38])
    stored = e8m0_scale(amax, E4M3).double().reciprocal()
    assert stored.tolist() == [2.0**-127, 2.0**127, 2.0**-127, 2.0**-7, 1.0, 2.0, 2.0**120]
    assert e8m0_scale(torch.tensor([float("nan")]), E4M3).isnan().all()


def test_powers_of_two_are_exact_over_the_whole_range():
    exponents = list(range(-126, 127))
    amax = torch.tensor([2.0**e for e in exponents])
    assert [math.log2(s) for s in e8m0_scale(amax, E4M3).tolist()] == [min(8 - e, 127) for e in exponents]


@pytest.mark.parametrize("recipe", RECIPES)
def test_zeros_infinities_and_nans_keep_what_they_are(recipe):
    rounding = RECIPES[recipe]
    assert torch.equal(rounding(torch.zeros(3, 40), "input", False)[0], torch.zeros(3, 40))
    nan = rounding(torch.tensor([[1.0, float("nan")]]), "input", False)[0]
    assert nan[0, 1].isnan()
    infinite = rounding(torch.tensor([[1.0, float("-inf")]]), "input", False)[0]
    assert infinite[0, 1] <= -448
    assert rounding(torch.zeros(0, 8), "input", True)[1].shape == (0, 8)


def test_what_is_too_large_saturates():
    assert cast_round_trip(torch.tensor([1e6, -1e6]), torch.tensor(2.0), E4M3).tolist() == [224.0, -224.0]


@pytest.mark.parametrize(("dtype", "bits", "smallest"), [(E4M3, 3, 2.0**-6), (E5M2, 2, 2.0**-14)])
def test_normal_numbers_are_rounded_by_at_most_half_a_unit_in_the_last_place(dtype, bits, smallest):
    values = gaussian(256, 256)
    scale = scale_of_amax(values.abs().amax(), dtype)
    rounded = round_blocks(values, (256, 256), dtype)
    normal = (values * scale).abs() >= smallest
    bound = 2.0 ** -(bits + 1) * (1 + 1e-5)
    assert ((rounded - values).abs()[normal] <= bound * values.abs()[normal]).all()
    assert ((rounded - values).abs()[~normal] <= smallest * 2.0 ** -(bits + 1) / scale * (1 + 1e-5)).all()


def median_error(recipe: str, values: torch.Tensor, role: str = "input") -> float:
    """Median over the numbers of |rounded - value| / |value|."""
    return float(((RECIPES[recipe](values, role, False)[0] - values) / values).abs().median())


def test_outliers_hurt_the_coarser_scales_more():
    mx, blockwise, tensorwise = (
        median_error(recipe, spiky(512, 512)) for recipe in ("mxfp8", "blockwise", "tensorwise")
    )
    assert mx <= blockwise < tensorwise == 1.0
    assert all(0.015 < median_error(recipe, gaussian(512, 512)) < 0.035 for recipe in RECIPES)


def test_gradients_lose_a_bit_where_the_recipe_is_hybrid():
    values = gaussian(512, 512)
    for recipe, ratio in (("tensorwise", 2.0), ("blockwise", 1.0), ("mxfp8", 1.0)):
        assert median_error(recipe, values, "gradient") / median_error(recipe, values) == pytest.approx(
            ratio, rel=0.1
        ), recipe


def test_delayed_scaling_uses_the_amax_of_the_training_pass_before():
    rounding, first, second = Delayed(), gaussian(8, 16), 100 * gaussian(8, 16, seed=1)
    assert torch.equal(rounding(first, "input", True)[0], first.to(E4M3).float())
    scale = torch.tensor(448.0) / first.abs().max()
    expected = (second * scale).clamp(-448, 448).to(E4M3).float() * (1 / scale)
    assert torch.equal(rounding(second, "input", False)[0], expected)
    assert torch.equal(rounding(second, "input", True)[1], expected)
    assert rounding.scales["input"] == torch.tensor(448.0) / second.abs().max()
    assert rounding.scales["weight"] == rounding.scales["gradient"] == 1


def test_delayed_scaling_learns_nothing_from_zeros_and_overflows():
    rounding = Delayed()
    rounding(gaussian(4, 4), "gradient", True)
    before = rounding.scales["gradient"].clone()
    for useless in (torch.zeros(4, 4), torch.full((4, 4), float("inf")), torch.zeros(0, 4)):
        rounding(useless, "gradient", True)
        assert rounding.scales["gradient"] == before
