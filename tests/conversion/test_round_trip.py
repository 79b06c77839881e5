"""Hugging Face to Megatron to Hugging Face, in one process."""

import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from helpers.tiny_models import write_tiny_vision_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from exprl_megatron.config.policy import PolicyConfig
from exprl_megatron.conversion.to_hf import convert_to_huggingface
from exprl_megatron.conversion.to_megatron import convert_to_megatron
from exprl_megatron.conversion.verify import verify_weights
from exprl_megatron.conversion.weights import open_weights
from exprl_megatron.models.architecture import read_architecture
from exprl_megatron.policy.policy import Policy

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
FAMILIES = {
    "llama": {},
    "qwen2": {"tied": True},
    "qwen3": {"vocab_size": 107},
    "qwen3-moe": {},
    "mixtral": {},
    "mistral": {},
    "seed-oss": {"vocab_size": 107},
    "glm4-moe": {"vocab_size": 107, "mtp": True},
    "olmo3": {"layers": 4},
    "qwen3.5": {"vocab_size": 107},
    "qwen3.5-moe": {"vocab_size": 107},
}
YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
    "mscale": 2.0,
    "mscale_all_dim": 0.5,
    "truncate": False,
    "attention_factor": (0.2 * math.log(8) + 1) / (0.05 * math.log(8) + 1),
}

COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


def _tool():
    specification = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
    tool = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tool)
    return tool


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_every_tensor_is_bit_equal(tiny_model, tmp_path, tensors, same, family):
    model = tiny_model(family, **FAMILIES[family])
    convert_to_megatron(model, tmp_path / "megatron", file_bytes=100_000)
    convert_to_huggingface(open_weights(tmp_path / "megatron"), tmp_path / "back", file_bytes=100_000)
    assert same(tensors(tmp_path / "back"), tensors(model))
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    files = {file.name: load_file(file) for file in (tmp_path / "back").glob("*.safetensors")}
    assert index["weight_map"] == {name: file for file, held in files.items() for name in held}
    assert index["metadata"]["total_size"] == sum(t.nbytes for held in files.values() for t in held.values())
    assert len(files) > 2
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((model / "config.json").read_text())
    for name in COMPANIONS:
        assert (tmp_path / "back" / name).read_bytes() == (model / name).read_bytes()


@pytest.mark.parametrize("published_form", [True, False], ids=["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("rope", [YARN, {"rope_type": "linear", "factor": 4.0}], ids=["yarn", "linear"])
def test_stretched_positions_come_back_with_every_setting(tiny_model, tmp_path, tensors, same, rope, published_form):
    model = tiny_model("qwen3", rope=rope, published_form=published_form)
    convert_to_megatron(model, tmp_path / "megatron")
    convert_to_huggingface(open_weights(tmp_path / "megatron"), tmp_path / "back")
    assert same(tensors(tmp_path / "back"), tensors(model))
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config == json.loads((model / "config.json").read_text())
    assert config["rope_scaling" if published_form else "rope_parameters"].items() >= rope.items()
    assert read_architecture(tmp_path / "back") == read_architecture(model)


@pytest.mark.parametrize("family", ["qwen3", "glm4-moe", "olmo3", "qwen3.5"])
def test_a_policy_in_one_process_loads_a_converted_directory(tiny_model, tmp_path, world, tensors, same, family):
    model = tiny_model(family, **FAMILIES[family])
    convert_to_megatron(model, tmp_path / "megatron")
    Policy(PolicyConfig(model=str(tmp_path / "megatron")), seed=0).save_huggingface(tmp_path / "saved")
    assert same(tensors(tmp_path / "saved"), tensors(model))


@pytest.mark.parametrize("family", ["qwen3.5", "qwen3.5-moe"])
def test_a_vision_model_goes_there_and_back_by_the_command(tiny_model, tmp_path, world, tensors, same, family):
    model = write_tiny_vision_model(tmp_path / "vision", tiny_model(family))
    run, app = CliRunner().invoke, _tool().app
    assert run(app, ["to-megatron", str(model), str(tmp_path / "m"), "--file-gb", "0.0001"]).exit_code == 0
    assert run(app, ["to-hf", str(tmp_path / "m"), str(tmp_path / "back"), "--file-gb", "0.0001"]).exit_code == 0
    assert same(tensors(tmp_path / "back"), tensors(model))
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((model / "config.json").read_text())
    assert run(app, ["verify", str(model), str(tmp_path / "m"), "--logits", "no"]).exit_code == 0
    Policy(PolicyConfig(model=str(tmp_path / "m")), seed=0).save_huggingface(tmp_path / "saved")
    assert same(tensors(tmp_path / "saved"), tensors(model))


def test_bf16_is_torchs_rounding_and_returns_bit_equal(tiny_model, tmp_path, tensors, same):
    model = tiny_model("llama")
    convert_to_megatron(model, tmp_path / "megatron", dtype=torch.bfloat16)
    convert_to_huggingface(open_weights(tmp_path / "megatron"), tmp_path / "back")
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in tensors(model).items()}
    assert same(tensors(tmp_path / "back"), rounded)
    assert json.loads((tmp_path / "back/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert verify_weights(model, tmp_path / "back", logits="no").equal
    convert_to_huggingface(open_weights(tmp_path / "megatron"), tmp_path / "wide", torch.float32)
    assert same(tensors(tmp_path / "wide"), {name: tensor.float() for name, tensor in rounded.items()})


def test_a_model_in_bf16_keeps_the_bias_of_its_router_and_what_is_copied_through(
    tiny_model, tmp_path, world, tensors, same
):
    model = tiny_model("glm4-moe", mtp=True)
    convert_to_megatron(model, tmp_path / "megatron", dtype=torch.bfloat16)
    convert_to_huggingface(open_weights(tmp_path / "megatron"), tmp_path / "back")
    expected = {
        name: tensor if name.startswith("model.layers.2.") or name.endswith("_bias") else tensor.bfloat16()
        for name, tensor in tensors(model).items()
    }
    assert same(tensors(tmp_path / "back"), expected)
    convert_to_huggingface(open_weights(model), tmp_path / "cast", torch.bfloat16)
    assert same(tensors(tmp_path / "cast"), expected)
    assert verify_weights(model, tmp_path / "back", logits="no").equal
    policy = Policy(PolicyConfig(model=str(tmp_path / "megatron"), precision="bf16"), seed=0)
    policy.save_huggingface(tmp_path / "saved")
    assert same(tensors(tmp_path / "saved"), expected)


def test_a_tensor_that_was_copied_through_wrong_is_found(tiny_model, tmp_path, tensors):
    model = copied(tiny_model("glm4-moe", mtp=True), tmp_path / "model")
    convert_to_megatron(model, tmp_path / "megatron")
    convert_to_huggingface(open_weights(tmp_path / "megatron"), tmp_path / "back")
    wrong = "model.layers.2.eh_proj.weight"
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    file = tmp_path / "back" / index["weight_map"][wrong]
    weights = load_file(file)
    weights[wrong][0, 0] += 1
    save_file(weights, file, metadata={"format": "pt"})
    assert verify_weights(model, tmp_path / "back", logits="no").differing == [wrong]


def test_a_tied_output_layer_that_is_stored_twice_is_written_once(tiny_model, tmp_path, tensors):
    model = copied(tiny_model("qwen2", tied=True), tmp_path / "model")
    weights = tensors(model)
    twice = weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(twice, model / "model.safetensors")
    convert_to_megatron(model, tmp_path / "megatron")
    convert_to_huggingface(open_weights(tmp_path / "megatron"), tmp_path / "back")
    assert tensors(tmp_path / "back").keys() == weights.keys()


def test_verify_says_what_differs_and_how_far_logits_are_apart(tiny_model, tmp_path, tensors):
    model = tiny_model("qwen3")
    convert_to_megatron(model, tmp_path / "megatron")
    found = verify_weights(model, tmp_path / "megatron")
    assert found.equal
    assert len(found.hashes) == len(tensors(model))
    assert "Megatron's and transformers' differ by at most" in found.logits
    changed = copied(model, tmp_path / "changed")
    weights = tensors(model)
    weights["model.layers.1.self_attn.k_proj.weight"][3] += 1.0
    save_file(weights, changed / "model.safetensors")
    found = verify_weights(changed, tmp_path / "megatron")
    assert found.differing == ["model.layers.1.self_attn.k_proj.weight"]
    assert not found.logits_agree


def test_where_both_models_do_not_fit_into_memory_verify_compares_hashes_alone(tiny_model, tmp_path, monkeypatch):
    model = tiny_model("qwen3")
    convert_to_megatron(model, tmp_path / "megatron")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100_000))
    found = verify_weights(model, tmp_path / "megatron")
    assert found.equal
    assert {len(entry["sha256"]) for entry in found.hashes.values()} == {64}
    assert found.logits.startswith("not compared, both models need")


def test_the_command_line_converts_verifies_and_says_so_by_its_status(tiny_model, tmp_path):
    model, run, app = tiny_model("qwen2"), CliRunner().invoke, _tool().app
    assert run(app, ["to-megatron", str(model), str(tmp_path / "m"), "--file-gb", "0.0001"]).exit_code == 0
    assert run(app, ["to-hf", str(tmp_path / "m"), str(tmp_path / "hf"), "--dtype", "bf16"]).exit_code == 0
    hashes = tmp_path / "hashes.json"
    verified = ["verify", str(model), str(tmp_path / "hf"), "--logits", "no", "--json", str(hashes)]
    assert run(app, verified).exit_code == 0
    assert len(json.loads(hashes.read_text())["model.norm.weight"]["sha256"]) == 64
    other = tiny_model("qwen2", seed=1)
    assert run(app, ["verify", str(other), str(tmp_path / "hf"), "--logits", "no"]).exit_code == 1


def copied(model: Path, directory: Path) -> Path:
    directory.mkdir()
    for file in model.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory
