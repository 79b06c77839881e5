"""Packed against padded, and sequences shared by several ranks, against transformers and one rank."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from context_parallel_worker import LAYOUTS, OTHERS
from helpers.ranks import run_ranks
from helpers.witness import expectation, largest_difference, sequences
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

VOCABULARY = 107


@pytest.fixture(scope="module")
def models(tiny_model: Callable[..., Path]) -> dict[str, Path]:
    return {name: tiny_model(name, tied=True, vocab_size=VOCABULARY, layers=4) for name in ("qwen3", "llama")}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("context_parallel")


@pytest.fixture(scope="module")
def results(models: dict[str, Path], out: Path) -> dict:
    return run_ranks(Path(__file__).with_name("context_parallel_worker.py"), 4, out, models=models)


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> dict[str, dict]:
    return {family: expectation(path, sequences(VOCABULARY), 0.7) for family, path in models.items()}


@pytest.mark.parametrize("case", ["qwen3 TP1 packed", "qwen3 TP1 padded", "qwen3 CP2 packed", "llama CP2"])
def test_a_step_is_that_of_transformers(results, expected, case):
    result, witness = results[case], expected[case.split()[0]]
    assert largest_difference(result["log_probs"], witness["log_probs"]) <= 1e-4
    for name in ("loss", "entropy", "gap/max", "grad_norm"):
        assert result[name] == pytest.approx(witness[name], rel=2e-5), name


@pytest.mark.parametrize(
    "case", [f"{layout} {kind}" for layout in LAYOUTS for kind in ("packed", "padded")] + list(OTHERS)
)
def test_two_steps_are_those_of_one_rank_with_padded_rows(results, case):
    reference, result = results["qwen3 TP1 padded"], results[f"qwen3 {case}"]
    for name in ("loss", "entropy", "gap/max", "grad_norm", "second", "second_grad_norm"):
        assert result[name] == pytest.approx(reference[name], rel=1e-5), name
    assert largest_difference(result["log_probs"], reference["log_probs"]) <= 1e-5
    assert largest_difference(result["learned"], reference["learned"]) <= 1e-4


def test_weights_come_out_bit_equal_to_what_went_in(results, models, out):
    before, after = (load_file(path / "model.safetensors") for path in (models["llama"], out / "llama"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
