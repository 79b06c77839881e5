"""The same model, batch and step in many layouts, against transformers and against each other."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.ranks import run_ranks
from helpers.witness import expectation, largest_difference, sequences
from layouts_worker import BASE, FAR, FEW, MORE, REJECTING, VARIANTS
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

FAMILIES = ("llama", "qwen2", "qwen3")
CASES = [(family, layout) for layout in BASE for family in FAMILIES] + FEW
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 2.0, "beta_slow": 0.5}
"""Most of the sequences end past the original length."""
VOCABULARY = 107
"""Prime, so that every tensor-parallel size has to pad it."""


@pytest.fixture(scope="module")
def models(tiny_model: Callable[..., Path]) -> dict[str, Path]:
    shape = {"vocab_size": VOCABULARY, "layers": 4}
    ropes = {"qwen2": YARN}
    return {
        family: tiny_model(family, tied=family != "qwen2", rope=ropes.get(family), **shape)
        for family in (*FAMILIES, *dict(FEW))
    }


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def results(models: dict[str, Path], out: Path) -> dict:
    return run_ranks(Path(__file__).with_name("layouts_worker.py"), 4, out, models=models)


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> dict[str, dict]:
    return {family: expectation(path, sequences(VOCABULARY), 0.7) for family, path in models.items()}


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_log_probs_are_those_of_transformers(results, expected, family, layout):
    assert largest_difference(results[f"{family} {layout}"]["log_probs"], expected[family]["log_probs"]) <= 1e-4


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_loss_and_gradient_norm_are_those_of_autograd_in_transformers(results, expected, family, layout):
    for name in ("loss", "entropy", "gap/max", "grad_norm"):
        assert results[f"{family} {layout}"][name] == pytest.approx(expected[family][name], rel=2e-5), name


@pytest.mark.parametrize("layout", [*BASE, *MORE, *VARIANTS])
def test_two_steps_do_not_depend_on_layout_packing_recomputation_or_optimizer_sharding(results, layout):
    reference, result = results["qwen3 TP1"], results[f"qwen3 {layout}"]
    for name in ("loss", "entropy", "grad_norm", "second", "second_grad_norm"):
        assert result[name] == pytest.approx(reference[name], rel=1e-5), name
    assert largest_difference(result["learned"], reference["learned"]) <= 1e-4


@pytest.mark.parametrize("layout", REJECTING)
def test_sequences_that_leave_the_denominator_are_as_if_they_had_not_been_sampled(results, layout):
    found, alone = results[f"rejecting {layout}"], results["kept alone"]
    tokens = [sample.response_tokens for sample in sequences(VOCABULARY)]
    scale = sum(tokens) / sum(n for i, n in enumerate(tokens) if i not in FAR)
    assert found["updates"][0]["scale"] == pytest.approx(scale) and scale > 1.2
    for name in ("loss", "grad_norm"):
        assert found["updates"][0][name] == pytest.approx(alone["updates"][0][name], rel=1e-5), name


@pytest.mark.parametrize("layout", REJECTING)
def test_the_trainers_log_probs_on_disk_are_those_of_transformers_whichever_ranks_write_them(results, expected, layout):
    first, second = results[f"rejecting {layout}"]["written"]
    by_place = {(group, sample): values for group, sample, values in first}
    assert len(first) == len(second) == len(by_place) == len(expected["qwen3"]["log_probs"])
    in_order = [by_place[divmod(i, 2)] for i in range(len(first))]
    assert largest_difference(in_order, expected["qwen3"]["log_probs"]) <= 1e-4
    # The second step's are those of the weights after the first.
    assert all(one != other for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("layout", list(REJECTING)[1:])
def test_updates_without_rejected_sequences_do_not_depend_on_the_layout(results, layout):
    found, expected = results[f"rejecting {layout}"], results["rejecting TP1"]
    for mine, theirs in zip(found["updates"], expected["updates"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    assert largest_difference(found["learned"], expected["learned"]) <= 1e-4


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_weights_come_out_bit_equal_to_what_went_in(results, models, out, family, layout):
    before = load_file(models[family] / "model.safetensors")
    after = load_file(out / f"{family}-{layout}" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_exported_config_and_tokenizer_are_the_models_own(results, models, out):
    exported = out / "llama-TP2xPP2"
    config = json.loads((models["llama"] / "config.json").read_text())
    assert json.loads((exported / "config.json").read_text()) == config | {"torch_dtype": "float32"}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (exported / name).read_bytes() == (models["llama"] / name).read_bytes()


@pytest.mark.parametrize("layout", BASE)
def test_a_random_model_is_the_same_in_every_layout(results, layout):
    assert largest_difference(results[f"random {layout}"], results["random TP1"]) <= 1e-5


def test_gradients_of_log_probs_are_right_where_the_vocabulary_is_cut_and_padded(results):
    assert all(error < 1e-5 for error in results["gradients of log-probs"].values())


def test_more_processes_than_the_layout_needs_are_refused(results):
    assert results["wrong world"] == (
        "4 trainer processes were started but policy.layout needs 2 (tp 2 x cp 1 x dp 1 x pp 1); "
        "start 2, or change the layout."
    )
