"""Experts of a layer in one tensor: where a single expert's numbers are, and what is refused."""

import random

import pytest
import torch
from helpers.tiny_models import with_joined_experts, write_tiny_vision_model
from safetensors.torch import load_file, save_file

from exprl_megatron.errors import UserError
from exprl_megatron.models.architecture import read_architecture
from exprl_megatron.models.joined_experts import Joiner, pieces, place_of
from exprl_megatron.models.weight_readers import Safetensors, has_joined_experts

LAYER = "model.layers.1.mlp.experts."


@pytest.fixture
def mixture(tiny_model, tmp_path):
    """A model with joined experts, and the tensors of the same with an expert each."""
    single = tiny_model("qwen3.5-moe")
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((single / name).read_bytes())
    weights = load_file(single / "model.safetensors")
    save_file(with_joined_experts(weights), tmp_path / "model.safetensors")
    return tmp_path, weights


def test_single_experts_are_read_out_of_the_joined_ones_whole_and_in_parts(mixture):
    directory, weights = mixture
    with Safetensors(directory, read_architecture(directory)) as source:
        for name, tensor in weights.items():
            assert source.has(name)
            assert torch.equal(source.read(name), tensor), name
            if ".experts." in name:
                assert torch.equal(source.read(name, 0, 3, 9), tensor[3:9]), name
                assert torch.equal(source.read(name, 0, 3), tensor[3:]), name
                assert torch.equal(source.read(name, 1, 5, 8), tensor[:, 5:8]), name


def test_they_are_joined_again_in_whatever_order_they_come(mixture):
    directory, weights = mixture
    joiner, tensors = Joiner(read_architecture(directory)), list(weights.items())
    random.Random(0).shuffle(tensors)
    joined = dict(entry for start in range(0, len(tensors), 3) for entry in joiner.add(tensors[start : start + 3]))
    expected = load_file(directory / "model.safetensors")
    assert joined.keys() == expected.keys()
    assert all(torch.equal(joined[name], expected[name]) for name in expected)


def test_a_place_is_the_piece_that_is_read(mixture):
    architecture = read_architecture(mixture[0])
    found = pieces(
        [f"{LAYER}gate_up_proj", f"{LAYER}down_proj", f"{LAYER}other", "mtp.layers.0.mlp.experts.down_proj"],
        architecture,
    )
    assert len(found) == 3 * 4
    assert all(place_of(name, architecture) == piece for name, piece in found.items())
    assert place_of("model.layers.1.mlp.shared_expert.up_proj.weight", architecture) is None


def test_whether_a_directory_has_joined_experts_is_what_its_files_say(mixture, tiny_model, tmp_path):
    vision = write_tiny_vision_model(tmp_path / "vision", tiny_model("qwen3.5-moe"))
    expected = {mixture[0]: True, vision: True, tiny_model("qwen3.5-moe"): False, tiny_model("qwen3-moe"): False}
    assert {path: has_joined_experts(path, read_architecture(path)) for path in expected} == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda name, tensor: {name: tensor[:-1]}, "has shape .3, 64, 64., config.json says .4, 64, 64."),
        (lambda name, tensor: {}, "lacks tensor model.layers.0.mlp.experts.0.gate_proj.weight .8 such"),
        (lambda name, tensor: {name: tensor, f"{LAYER}other_proj": tensor}, "has the unknown tensor"),
    ],
)
def test_joined_experts_of_another_shape_or_number_are_refused(mixture, change, said):
    directory, _ = mixture
    weights, name = load_file(directory / "model.safetensors"), "model.layers.0.mlp.experts.gate_up_proj"
    rest = {key: tensor for key, tensor in weights.items() if key != name}
    save_file(
        {key: t.clone() for key, t in (rest | change(name, weights[name])).items()}, directory / "model.safetensors"
    )
    with pytest.raises(UserError, match=said):
        Safetensors(directory, read_architecture(directory))
