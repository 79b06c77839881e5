"""What `verify` compares beside the tensors that a policy learns, and directories that are not opened."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import write_tiny_vision_model
from safetensors.torch import load_file, save_file

from exprl_megatron.conversion.to_hf import convert_to_huggingface
from exprl_megatron.conversion.to_megatron import convert_to_megatron
from exprl_megatron.conversion.verify import verify_weights
from exprl_megatron.conversion.weights import open_weights
from exprl_megatron.errors import UserError
from exprl_megatron.models.left_out import LEFT_OUT


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


@pytest.mark.parametrize("family", ["glm4-moe", "qwen3.5", "qwen3.5-moe"])
def test_megatrons_files_are_compared_with_the_model_whose_left_out_tensors_they_have(tiny_model, tmp_path, family):
    model = tiny_model(family, mtp=True) if family == "glm4-moe" else None
    model = model or write_tiny_vision_model(tmp_path / "vision", tiny_model(family))
    convert_to_megatron(model, tmp_path / "megatron")
    assert verify_weights(model, tmp_path / "megatron", logits="no").equal
    left_out = load_file(tmp_path / "megatron" / LEFT_OUT)
    name = min(left_out)
    save_file(left_out | {name: left_out[name] + 1}, tmp_path / "megatron" / LEFT_OUT)
    assert verify_weights(model, tmp_path / "megatron", logits="no").differing == [name]


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
