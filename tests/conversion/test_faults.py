"""What is incomplete, damaged or does not fit is refused before anything is written."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader

from exprl_megatron.config.policy import OptimizerConfig, PolicyConfig
from exprl_megatron.conversion.to_hf import convert_to_huggingface
from exprl_megatron.conversion.to_megatron import convert_to_megatron
from exprl_megatron.conversion.weights import open_weights
from exprl_megatron.errors import UserError
from exprl_megatron.policy.checkpoint import save_checkpoint
from exprl_megatron.policy.policy import Policy

NORM = "model.layers.1.input_layernorm.weight"
KEY = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model("qwen3"), tmp_path / "model"))


@pytest.fixture
def converted(tiny_model, tmp_path) -> Path:
    convert_to_megatron(tiny_model("qwen3"), tmp_path / "converted", file_bytes=100_000)
    return tmp_path / "converted"


def without(weights: dict) -> None:
    del weights[NORM]


def one_more(weights: dict) -> None:
    weights["model.layers.2.input_layernorm.weight"] = weights[NORM].clone()


def other_shape(weights: dict) -> None:
    weights[KEY] = weights[KEY][:-1].clone()


def no_head(weights: dict) -> None:
    del weights["lm_head.weight"]


def eight_bits(weights: dict) -> None:
    weights[KEY] = weights[KEY].to(torch.float8_e4m3fn)


def mixed_layers(weights: dict) -> None:
    weights[NORM] = weights[NORM].bfloat16()


def mixed_parts(weights: dict) -> None:
    weights[KEY] = weights[KEY].bfloat16()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without, rf"lacks tensor {NORM}"),
        (one_more, "unknown tensor model.layers.2.input_layernorm.weight"),
        (other_shape, rf"tensor {KEY} has shape \(31, 64\), config.json says \(32, 64\)"),
        (no_head, "lacks tensor lm_head.weight"),
        (eight_bits, rf"tensor {KEY} has dtype F8_E4M3; use weights in F32, BF16, F16"),
        (mixed_layers, rf"{NORM} is torch.bfloat16, other layers' are torch.float32; give --dtype"),
        (mixed_parts, "have the dtypes BF16, F32; give --dtype"),
    ],
)
def test_weights_that_do_not_fit_are_refused(model, tmp_path, change, says):
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, model / "model.safetensors")
    with pytest.raises(UserError, match=says):
        convert_to_megatron(model, tmp_path / "target")
    assert not list(tmp_path.glob("target*"))


def test_an_output_layer_that_differs_from_the_tied_embedding_is_refused(tiny_model, tmp_path):
    model = Path(shutil.copytree(tiny_model("qwen3"), tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(UserError, match=r"ties its embeddings but lm_head.weight differs"):
        convert_to_megatron(model, tmp_path / "target")


@pytest.mark.parametrize(
    ("tied", "says"), [(True, "has the unknown Megatron parameter output_layer.weight"), (False, "lacks the Megatron")]
)
def test_megatron_files_that_are_not_tied_as_their_config_says_are_refused(tiny_model, tmp_path, world, tied, says):
    convert_to_megatron(tiny_model("qwen2", tied=not tied), tmp_path / "converted")
    file = tmp_path / "converted" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": tied}))
    with pytest.raises(UserError, match=says):
        convert_to_huggingface(open_weights(tmp_path / "converted"), tmp_path / "target")
    with pytest.raises(UserError, match=says):
        Policy(PolicyConfig(model=str(tmp_path / "converted")), seed=0)
    assert not list(tmp_path.glob("target*"))


def test_a_missing_and_a_truncated_shard_are_refused(converted, tmp_path):
    convert_to_huggingface(open_weights(converted), tmp_path / "model", file_bytes=100_000)
    shard = max((tmp_path / "model").glob("*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(UserError, match="truncated or damaged"):
        convert_to_megatron(tmp_path / "model", tmp_path / "target")
    shard.unlink()
    with pytest.raises(UserError, match=f"lacks {shard.name}"):
        convert_to_megatron(tmp_path / "model", tmp_path / "target")
    assert not list(tmp_path.glob("target*"))


def test_a_missing_and_a_truncated_megatron_file_are_refused_by_converter_and_policy(converted, tmp_path, world):
    file = max((converted / "megatron").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{file.name} is truncated"):
        open_weights(converted)
    with pytest.raises(UserError, match=f"{file.name} is truncated"):
        Policy(PolicyConfig(model=str(converted)), seed=0)
    file.unlink()
    with pytest.raises(UserError, match=f"lacks the file {file.name}"):
        open_weights(converted)
    (converted / "megatron" / ".metadata").unlink()
    with pytest.raises(UserError, match="no complete Megatron files"):
        open_weights(converted)


def rewritten(converted: Path, change) -> None:
    """Changes the metadata of Megatron's files."""
    metadata = FileSystemReader(converted / "megatron").read_metadata()
    change(metadata.state_dict_metadata)
    (converted / "megatron" / ".metadata").write_bytes(pickle.dumps(metadata))


def test_a_parameter_too_few_too_many_of_another_shape_or_in_part_is_refused(converted):
    metadata = (converted / "megatron" / ".metadata").read_bytes()
    projection = "decoder.layers.self_attention.linear_proj.weight"

    def reshape(tensors):
        tensors[projection].size = torch.Size((2, 64, 65))

    changes = {
        lambda tensors: tensors.pop(projection): "lacks the Megatron parameter",
        lambda tensors: tensors.update(extra=tensors[projection]): "has the unknown Megatron parameter extra",
        reshape: r"has shape \(2, 64, 65\), config.json says \(2, 64, 64\)",
        lambda tensors: tensors[projection].chunks.pop(): r"linear_proj.weight\[1\] 0 numbers of 4096 are there",
    }
    for change, says in changes.items():
        (converted / "megatron" / ".metadata").write_bytes(metadata)
        rewritten(converted, change)
        with pytest.raises(UserError, match=says):
            open_weights(converted)


def test_a_checkpoint_of_another_model_and_one_without_its_run_are_refused(tiny_model, tmp_path, world):
    policy = Policy(PolicyConfig(model=str(tiny_model("qwen3"))), seed=0)
    policy.begin_stage(OptimizerConfig(), total_steps=1)
    checkpoint = save_checkpoint(tmp_path / "run" / "checkpoints", policy, {}, keep=1)
    with pytest.raises(UserError, match="give it by --origin"):
        open_weights(checkpoint)
    with pytest.raises(UserError, match=r"another model than .* holds \(layers\)"):
        open_weights(checkpoint, tiny_model("qwen3", layers=4))
    (checkpoint / "state.json").unlink()
    with pytest.raises(UserError, match="no complete checkpoint"):
        open_weights(tmp_path / "run")


def test_an_existing_target_is_left_alone(tiny_model, tmp_path):
    (tmp_path / "target").mkdir()
    with pytest.raises(UserError, match="exists already"):
        convert_to_megatron(tiny_model("qwen3"), tmp_path / "target")
    assert not list((tmp_path / "target").iterdir())


def test_of_a_run_the_newest_checkpoint_that_is_complete_is_read(tmp_path):
    for number, complete in ((2, True), (10, True), (11, False)):
        checkpoint = tmp_path / "checkpoints" / f"checkpoint-{number:08d}"
        checkpoint.mkdir(parents=True)
        if complete:
            (checkpoint / "state.json").write_text("{}")
    (tmp_path / "checkpoints" / "checkpoint-00000012.partial").mkdir()
    # What is in it does not matter here: the one that is chosen is named.
    with pytest.raises(UserError, match=r"checkpoint-00000010 is in no run that would name its model"):
        open_weights(tmp_path)
