"""Which safetensors make up a model: each tensor once, without scales, in files that all libraries read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from exprl_megatron.errors import UserError
from exprl_megatron.models.architecture import read_architecture
from exprl_megatron.models.weight_readers import INDEX, SINGLE, Safetensors

FAMILIES = ("llama", "glm4-moe", "qwen3.5-moe")


@pytest.fixture(params=FAMILIES)
def model(request, tiny_model, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_model(request.param), tmp_path / "model"))


def refusal(model: Path) -> str:
    with pytest.raises(UserError) as refused, Safetensors(model, read_architecture(model)):
        pass
    return str(refused.value).removeprefix(str(model))


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})


def split(model: Path, repeated: dict[str, torch.Tensor]) -> None:
    """Weights in two files with an index; the second has the tensors `repeated` of the first again."""
    weights = load_file(model / SINGLE)
    names = sorted(weights)
    parts = [{name: weights[name] for name in half} for half in (names[: len(names) // 2], names[len(names) // 2 :])]
    index = {}
    for number, part in enumerate(parts):
        index |= dict.fromkeys(part, f"model-{number}.safetensors")
        save(part | (repeated if number else {}), model / f"model-{number}.safetensors")
    (model / INDEX).write_text(json.dumps({"weight_map": index}))
    (model / SINGLE).unlink()


def test_a_tensor_in_two_files_is_refused_even_if_it_is_the_same(model):
    name, tensor = min(load_file(model / SINGLE).items())
    split(model, {})
    with Safetensors(model, read_architecture(model)) as source:
        assert torch.equal(source.read(name), tensor)
    for again in (tensor, tensor + 1):
        save(load_file(model / "model-1.safetensors") | {name: again}, model / "model-1.safetensors")
        assert (
            refusal(model)
            == f" has the tensor {name} in model-1.safetensors and in another file; fetch the model again."
        )


def test_a_single_file_beside_an_index_of_others_is_refused(model):
    """transformers would read the one, SGLang the others."""
    single = load_file(model / SINGLE)
    split(model, {})
    save({name: tensor + 1 for name, tensor in single.items()}, model / SINGLE)
    assert refusal(model).startswith(f" has both {SINGLE} and {INDEX}, which names other files")
    (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(single, SINGLE)}))
    with Safetensors(model, read_architecture(model)):
        pass


def test_another_file_with_the_model_s_tensors_is_refused_where_servers_would_read_it(model):
    single = load_file(model / SINGLE)
    other = model / "zz-older.safetensors"
    save({"base_model.lora_A.weight": torch.ones(2)}, other)
    with Safetensors(model, read_architecture(model)):
        pass
    save({name: tensor + 1 for name, tensor in single.items()}, other)
    assert f"has the tensor {min(single)} in {SINGLE} and in zz-older.safetensors" in refusal(model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int32, torch.float64])
def test_weights_in_a_dtype_that_means_nothing_without_scales_are_refused(model, dtype):
    name = "model.norm.weight"
    weights = load_file(model / SINGLE)
    save(weights | {name: weights[name].to(dtype)}, model / SINGLE)
    assert refusal(model).startswith(f": tensor {name} has dtype ")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_it_is(model, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in load_file(model / SINGLE).items()}
    save(weights, model / SINGLE)
    with Safetensors(model, read_architecture(model)) as source:
        assert torch.equal(source.read("model.norm.weight"), weights["model.norm.weight"])


def test_a_layer_too_many_is_not_taken_for_one_of_multi_token_prediction(tiny_model, tmp_path):
    """A config.json with one layer less would leave out the last layer of the model."""
    model = Path(shutil.copytree(tiny_model("glm4-moe", layers=3), tmp_path / "model"))
    tree = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(tree | {"num_hidden_layers": 2}))
    assert refusal(model).startswith(" has tensors of model.layers.2, which is behind the 2 layers of its config.json")
