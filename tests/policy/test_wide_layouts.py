"""Experts, uneven pipelines, overlapped communication and context parallelism, in worlds of up to eight ranks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.ranks import run_ranks
from helpers.witness import expectation, gradient_norm_of_balance, largest_difference, sequences, with_experts
from safetensors.torch import load_file
from wide_layouts_worker import BALANCE, BALANCED, CASES, LAYERS, REPLAYED

pytestmark = pytest.mark.slow

VOCABULARY = 107


@pytest.fixture(scope="module")
def models(tiny_model: Callable[..., Path]) -> dict[str, Path]:
    return {
        family: tiny_model(family, tied=family == "qwen3.5-moe", vocab_size=VOCABULARY, layers=layers)
        for family, layers in LAYERS.items()
    }


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wide_layouts")


@pytest.fixture(scope="module")
def results(models: dict[str, Path], out: Path) -> dict:
    return run_ranks(Path(__file__).with_name("wide_layouts_worker.py"), 8, out, timeout_s=900, models=models)


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> dict[str, dict]:
    return {family: expectation(path, sequences(VOCABULARY), 0.7) for family, path in models.items()}


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_log_probs_and_gradient_norm_are_those_of_transformers(results, expected, case):
    result, witness = results[case], expected[CASES[case][0]]
    assert largest_difference(result["log_probs"], witness["log_probs"]) <= 1e-4
    for name in ("loss", "entropy", "gap/max", "grad_norm"):
        assert result[name] == pytest.approx(witness[name], rel=2e-5), name


@pytest.mark.parametrize("case", CASES)
def test_loss_gradient_norm_and_updated_weights_are_those_of_one_rank(results, out, case):
    alone = f"{CASES[case][0]} TP1"
    for name in ("loss", "entropy", "grad_norm", "second", "second_grad_norm"):
        assert results[case][name] == pytest.approx(results[alone][name], rel=1e-5), name
    ours, theirs = weights(out / "after" / case), weights(out / "after" / alone)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


@pytest.mark.parametrize("case", CASES)
def test_weights_come_out_bit_equal_to_what_went_in(results, models, out, case):
    before, after = weights(models[CASES[case][0]]), weights(out / "before" / case)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("layout", BALANCED)
def test_the_load_balancing_loss_has_the_same_gradient_in_every_layout(results, models, layout):
    witness = gradient_norm_of_balance(models["qwen3-moe"], VOCABULARY, BALANCE)
    assert results[f"balance {layout}"] == pytest.approx(witness, rel=1e-4)


@pytest.mark.parametrize("case", REPLAYED)
def test_replayed_experts_are_used_in_every_layout_and_when_layers_are_computed_again(results, models, case):
    family = REPLAYED[case][0]
    batch = with_experts(sequences(VOCABULARY), LAYERS[family], experts=4, top_k=2)
    result, witness = results[f"replay {case}"], expectation(models[family], batch, 0.7)
    assert largest_difference(result["log_probs"], witness["log_probs"]) <= 1e-4
    for name in ("loss", "grad_norm"):
        assert result[name] == pytest.approx(witness[name], rel=2e-5), name
    for name in ("second_loss", "second_grad_norm"):
        assert result[name] == pytest.approx(results[f"replay {family} TP1"][name], rel=1e-5), name
