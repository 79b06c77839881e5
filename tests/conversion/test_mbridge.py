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


def check_names(directory: Path) -> None:
    architecture = read_architecture(directory)
    theirs = AutoBridge.from_config(AutoConfig.from_pretrained(directory), parallel_states=ParallelStates())
    table = parameters(architecture, Layout(), grouped=True)
    assert all(tuple(theirs._weight_name_mapping_mcore_to_hf(entry.name)) == entry.hf_names for entry in table)
    assert {name for entry in table for name in entry.hf_names} == hf_shapes(architecture).keys()


@pytest.mark.parametrize("name", ["llama-3.3-70b", "qwen2.5-72b", "qwen3-32b", "qwen3-235b-a22b"])
def test_every_parameter_of_a_published_model_is_made_of_the_tensors_that_mbridge_names(name):
    check_names(ARCHITECTURES / name)


def test_mixtrals_experts_are_made_of_the_tensors_that_mbridge_names(tiny_model):
    check_names(tiny_model("mixtral"))
