"""Real policies of several ranks load what was converted, and write checkpoints that are converted.

mbridge, which shares no code with this project, fills the same models from the original files.
"""

from pathlib import Path

import pytest
from conversion_worker import NO_WITNESS, OF_FAMILY
from helpers.ranks import run_ranks
from safetensors.torch import load_file

from exprl_megatron.conversion.to_hf import convert_to_huggingface
from exprl_megatron.conversion.to_megatron import convert_to_megatron
from exprl_megatron.conversion.weights import open_weights

pytestmark = pytest.mark.slow

SETTINGS = {"qwen2": {"tied": True, "vocab_size": 107}, "qwen3": {"vocab_size": 107}}
LOADED = [(family, layout) for family, layouts in OF_FAMILY.items() for layout in layouts]


@pytest.fixture(scope="module")
def models(tiny_model) -> dict[str, Path]:
    return {family: tiny_model(family, layers=4, **SETTINGS.get(family, {})) for family in OF_FAMILY}


@pytest.fixture(scope="module")
def written(models, tmp_path_factory) -> tuple[Path, dict]:
    """Where the ranks left what they loaded and their checkpoints; and where mbridge's parameters differ."""
    out = tmp_path_factory.mktemp("layouts")
    converted = {family: out / f"{family}-converted" for family in models}
    for family, model in models.items():
        convert_to_megatron(model, converted[family], file_bytes=200_000)
    return out, run_ranks(Path(__file__).with_name("conversion_worker.py"), 4, out, models=models, converted=converted)


@pytest.mark.parametrize(("family", "layout"), LOADED)
def test_a_converted_directory_is_loaded_bit_equal_in_any_layout(written, models, tensors, same, family, layout):
    assert same(tensors(written[0] / f"{family}-{layout}"), tensors(models[family]))


@pytest.mark.parametrize(("family", "layout"), [case for case in LOADED if case[0] not in NO_WITNESS])
def test_mbridge_fills_every_rank_with_the_same_parameters_and_exports_them(
    written, models, tensors, same, family, layout
):
    out, differing = written
    assert differing[f"{family} {layout}"] == []
    assert same(load_file(out / f"{family}-{layout}" / "mbridge"), tensors(models[family]))


@pytest.mark.parametrize("family", OF_FAMILY)
def test_a_runs_checkpoint_becomes_the_weights_that_its_policy_would_write(
    written, models, tensors, same, tmp_path, family
):
    run = written[0] / family / "run"
    (run / "config.yaml").write_text(f"policy:\n  model: {models[family]}\n")
    convert_to_huggingface(open_weights(run), tmp_path / "huggingface")
    assert same(tensors(tmp_path / "huggingface"), tensors(written[0] / family / "exported"))
    assert (tmp_path / "huggingface" / "tokenizer.json").is_file()
