"""The table's names on CUDA, where experts are grouped, against mbridge's; see also test_converted_layouts.py."""

from pathlib import Path

import pytest
from transformers import AutoConfig

from exprl_megatron import planning
from exprl_megatron.config.policy import Layout
from exprl_megatron.models.architecture import read_architecture
from exprl_megatron.models.name_map import hf_shapes, parameters

# isort: split
from mbridge import AutoBridge
from mbridge.core.parallel_states import ParallelStates

ARCHITECTURES = Path(planning.__file__).parent / "architectures"


def check_names(directory: Path, kind: str | None = None) -> None:
    """`kind`: the model type whose table of mbridge's is asked; None: the model's own."""
    architecture = read_architecture(directory)
    config = AutoConfig.from_pretrained(directory)
    if kind is not None:
        config.model_type = kind
    theirs = AutoBridge.from_config(config, parallel_states=ParallelStates())
    table = parameters(architecture, Layout(), grouped=True)
    assert all(tuple(theirs._weight_name_mapping_mcore_to_hf(entry.name)) == entry.hf_names for entry in table)
    assert {name for entry in table for name in entry.hf_names} == hf_shapes(architecture).keys()


@pytest.mark.parametrize(
    "name", ["llama-3.3-70b", "qwen2.5-72b", "qwen3-32b", "qwen3-235b-a22b", "glm-4.5-air", "glm-4.5"]
)
def test_every_parameter_of_a_published_model_is_made_of_the_tensors_that_mbridge_names(name):
    check_names(ARCHITECTURES / name)


def test_mixtrals_experts_are_made_of_the_tensors_that_mbridge_names(tiny_model):
    check_names(tiny_model("mixtral"))


@pytest.mark.parametrize(("name", "kind"), [("mistral-small-24b", "llama"), ("seed-oss-36b", "qwen2")])
def test_models_that_mbridge_does_not_know_are_made_as_those_with_the_same_layers(name, kind):
    check_names(ARCHITECTURES / name, kind)
