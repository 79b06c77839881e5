import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from random import Random

import pytest
import torch
from helpers.meta import meta_chunks, pretend_world

from exprl_megatron import planning
from exprl_megatron.config.policy import Layout, PolicyConfig
from exprl_megatron.models.architecture import Architecture, layout_violations, padded_vocabulary, read_architecture
from exprl_megatron.models.name_map import HEAD, embedding, hf_shapes, parameters
from exprl_megatron.planning.parameters import rank_counts
from exprl_megatron.policy.world import World

PUBLISHED = Path(planning.__file__).parent / "architectures"
LLAMA_70B = read_architecture(PUBLISHED / "llama-3.3-70b")


def by_the_table(architecture: Architecture, world: World) -> dict[tuple[int, str], tuple[int, ...]]:
    """The rank's parameters and their shapes, made of the Hugging Face shapes by the table of names."""
    shapes = hf_shapes(architecture)
    for name in (embedding(architecture), HEAD):
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


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
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


def legal_layouts(architecture: Architecture, most_ranks: int) -> list[Layout]:
    ranks = [
        dict(zip(("tp", "pp", "cp", "dp"), sizes, strict=True))
        for sizes in product((1, 2, 3, 4, 8), repeat=4)
        if math.prod(sizes) <= most_ranks
    ]
    rest = {"vpp": (1, 2, 3), "ep": (1, 2, 4, 8), "etp": (1, 2, 4)}
    rest |= {name: (False, True) for name in ("sequence_parallel", "embedding_as_layer", "head_as_layer")}
    others = [dict(zip(rest, values, strict=True)) for values in product(*rest.values())]
    every = (Layout(**one, **other) for one in ranks for other in others)
    return [layout for layout in every if not layout.violations(None) + layout_violations(architecture, layout)]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "layers"), [("qwen3-4b", 4), ("qwen3-30b-a3b", 4), ("mixtral-8x7b", 7)])
def test_megatron_builds_what_is_called_legal(model, layers):
    architecture = replace(read_architecture(PUBLISHED / model), layers=layers)
    layouts = legal_layouts(architecture, most_ranks=8)
    assert len(layouts) > 80
    for layout in Random(0).sample(layouts, 6):
        for rank in {0, layout.world_size - 1}:
            with pretend_world(layout, rank) as world:
                chunks = meta_chunks(architecture, PolicyConfig(model=model, precision="bf16", layout=layout), world)
                held = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
            assert held == rank_counts(architecture, layout, world.pp_rank).total, (layout, rank)


def test_a_real_world_is_not_replaced_by_a_pretended_one(world):
    with pytest.raises(RuntimeError, match="leave_world"), pretend_world(Layout(dp=2), 0):
        pass
