from dataclasses import replace
from pathlib import Path

import pytest
import torch

from exprl_megatron import planning
from exprl_megatron.config.policy import Layout, PolicyConfig
from exprl_megatron.policy.architecture import Architecture, padded_vocabulary, read_architecture
from exprl_megatron.policy.meta import meta_chunks, pretend_world
from exprl_megatron.policy.world import World
from exprl_megatron.resharding.names import EMBEDDING, HEAD, hf_shapes, parameters

LLAMA_70B = read_architecture(Path(planning.__file__).parent / "architectures" / "llama-3.3-70b")


def by_the_table(architecture: Architecture, world: World) -> dict[tuple[int, str], tuple[int, ...]]:
    """The rank's parameters and their shapes, made of the Hugging Face shapes by the table of names."""
    shapes = hf_shapes(architecture)
    for name in (EMBEDDING, HEAD):
        shapes[name] = (padded_vocabulary(architecture, world.layout.tp), architecture.hidden)
    found = {}
    for entry in parameters(architecture, world.layout):
        if entry.pp_rank == world.pp_rank:
            whole = [torch.empty(shapes[name], device="meta") for name in entry.hf_names]
            split = entry.rule.split_dim
            parts = [tensor if split is None else tensor.chunk(world.layout.tp, split)[0] for tensor in whole]
            found[entry.chunk, entry.name] = tuple(entry.rule.merge(parts).shape)
    return found


def by_megatron(architecture: Architecture, world: World) -> dict[tuple[int, str], tuple[int, ...]]:
    chunks = meta_chunks(architecture, PolicyConfig(model="none", precision="bf16", layout=world.layout), world)
    parameters = {
        (index, name): parameter for index, chunk in enumerate(chunks) for name, parameter in chunk.named_parameters()
    }
    assert {parameter.device.type for parameter in parameters.values()} == {"meta"}
    return {place: tuple(parameter.shape) for place, parameter in parameters.items()}


@pytest.mark.parametrize("tied", [False, True])
def test_one_process_stands_for_every_rank_of_a_layout(tiny_model, tied):
    architecture = replace(read_architecture(tiny_model("qwen3", tied=tied)), layers=4)
    layout = Layout(tp=2, pp=2, vpp=2, dp=2, sequence_parallel=True)
    places = set()
    for rank in range(layout.world_size):
        with pretend_world(layout, rank) as world:
            assert by_megatron(architecture, world) == by_the_table(architecture, world)
            places.add((world.tp_rank, world.pp_rank, world.dp_rank))
    assert len(places) == layout.world_size


@pytest.mark.parametrize("rank", [0, 127])
def test_a_70b_is_built_on_meta_as_the_table_has_it(rank):
    layout = Layout(tp=4, pp=4, vpp=5, cp=2, dp=4, sequence_parallel=True)
    with pretend_world(layout, rank) as world:
        assert by_megatron(LLAMA_70B, world) == by_the_table(LLAMA_70B, world)


def test_a_real_world_is_not_replaced_by_a_pretended_one(world):
    with pytest.raises(RuntimeError, match="leave_world"), pretend_world(Layout(dp=2), 0):
        pass
