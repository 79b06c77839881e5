"""What `verify` compares beside the tensors that a policy learns, and directories that are not opened."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import write_tiny_vision_model
from safetensors.torch import load_file, save_file

from exprl_megatron.conversion.to_hf import convert_to_huggingface
from exprl_megatron.conversion.verify import verify_weights
from exprl_megatron.conversion.weights import open_weights
from exprl_megatron.errors import UserError


def rewritten(model: Path, copy: Path, change) -> Path:
    """A copy of `model` in one file, whose tensors are what `change` makes of them."""
    shutil.copytree(model, copy)
    weights = {name: tensor for file in model.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for file in copy.glob("*.safetensors*"):
        file.unlink()
    save_file(change(weights), copy / "model.safetensors")
    return copy


def test_a_copy_without_its_vision_tower_differs_in_it(tiny_model, tmp_path):
    model = write_tiny_vision_model(tmp_path / "vision", tiny_model("qwen3.5"))
    tower = {name for name in load_file(model / "model.safetensors") if name.startswith("model.visual.")}
    copy = rewritten(model, tmp_path / "copy", lambda weights: {n: t for n, t in weights.items() if n not in tower})
    assert tower and set(verify_weights(model, copy, logits="no").differing) == tower
    assert set(verify_weights(copy, model, logits="no").differing) == tower


def test_a_quantized_copy_with_a_tensor_too_many_differs_in_it(tiny_model, tmp_path):
    model = tiny_model("qwen3", hidden=256)
    convert_to_huggingface(open_weights(model), tmp_path / "fp8", "fp8")
    one_more = {"model.layers.9.input_layernorm.weight": torch.ones(256)}
    copy = rewritten(tmp_path / "fp8", tmp_path / "copy", lambda weights: weights | one_more)
    assert json.loads((copy / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"
    assert verify_weights(model, tmp_path / "fp8").equal
    assert verify_weights(model, copy).differing == list(one_more)


@pytest.mark.parametrize("name", ["model.partial", "model.tmp"])
def test_what_was_never_finished_is_not_opened(tiny_model, tmp_path, name):
    shutil.copytree(tiny_model("qwen3"), tmp_path / name)
    with pytest.raises(UserError, match=f"{name} was never finished; run the command that was writing it again"):
        open_weights(tmp_path / name)
