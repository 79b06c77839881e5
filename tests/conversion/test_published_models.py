"""Models of 32 to 235 billion parameters, walked on the meta device: every rank of their recipes' layouts."""

import gc
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import pytest
import torch
from helpers.meta import meta_chunks, pretend_world
from helpers.recipe_layouts import RECIPES
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from exprl_megatron import planning
from exprl_megatron.config.policy import PolicyConfig
from exprl_megatron.models.architecture import padded_vocabulary, read_architecture
from exprl_megatron.models.name_map import hf_shapes, is_buffer, parameters
from exprl_megatron.models.rules import Vocabulary
from exprl_megatron.models.stored_parameters import stored_parameters
from exprl_megatron.policy.named_weights import named_weights

pytestmark = pytest.mark.slow

NUMBERS = {
    "llama-3.3-70b": 70.6,
    "qwen2.5-72b": 72.7,
    "qwen3-32b": 32.8,
    "qwen3-235b-a22b": 235.1,
    "glm-4.5-air": 106.9,
    "olmo-3-32b": 32.2,
    # Without the vision tower and multi-token prediction of what is published as 27B.
    "qwen3.5-27b": 26.9,
}
"""Billions, as published in the model cards."""
RANKS = {
    "llama-3.3-70b": 16,
    "qwen2.5-72b": 16,
    "qwen3-32b": 8,
    "qwen3-235b-a22b": 256,
    "glm-4.5-air": 32,
    "olmo-3-32b": 8,
    "qwen3.5-27b": 8,
}
"""Of a recipe those that differ in more than the data."""


@dataclass
class Walked:
    """What all ranks of a layout hold."""

    ranks: int = 0
    held: dict[tuple, dict[int, torch.Tensor]] = field(default_factory=dict)
    """(pipeline rank, chunk, name, expert-parallel rank or None) -> parameter by rank within the tensor's cut."""
    asked: dict[str, dict[tuple, tuple]] = field(default_factory=lambda: defaultdict(dict))
    """What Megatron asks converted files for: key -> offset -> (shape, global shape)."""


def architecture_of(name: str):
    return read_architecture(Path(planning.__file__).parent / "architectures" / name)


@pytest.fixture(scope="module", params=RECIPES)
def walked(request) -> Iterator[tuple[str, Walked]]:
    """Every rank built on meta."""
    layout, found = RECIPES[request.param], Walked()
    architecture = architecture_of(request.param)
    config = PolicyConfig(model="none", precision="bf16", layout=layout)
    for rank in range(layout.world_size):
        # Every world that is left collects garbage: none is among what is there now.
        gc.freeze()
        with pretend_world(layout, rank) as world:
            if world.cp_rank == 0 and (world.dp_rank == 0 or architecture.experts):
                look_at_rank(meta_chunks(architecture, config, world), world, found)
    yield request.param, found
    gc.unfreeze()


def look_at_rank(chunks: list, world, found: Walked) -> None:
    found.ranks += 1
    for index, chunk in enumerate(chunks):
        for name, parameter in named_weights(chunk):
            expert = ".experts." in name
            place = (world.pp_rank, index, name, world.ep_rank if expert else None)
            cut = world.etp_rank if expert else world.tp_rank
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            earlier = found.held.setdefault(place, {}).setdefault(cut, empty)
            kept = is_buffer(name) or name.endswith(".A_log")
            dtype = torch.float32 if kept else torch.bfloat16
            assert (earlier.shape, earlier.dtype) == (parameter.shape, dtype)
        for value in chunk.sharded_state_dict(metadata={"singleton_local_shards": False}).values():
            for shard in shards_of(value):
                shape = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
                found.asked[shard.key][tuple(shard.global_offset)] = (shape, tuple(shard.global_shape))


def shards_of(value) -> list[ShardedTensor]:
    """Of one entry of a sharded state dict; gate and up are two."""
    if isinstance(value, ShardedTensorFactory):
        built = value.build()
        return built if isinstance(built, list) else list(built.values())
    return [value] if isinstance(value, ShardedTensor) else []


def test_every_tensor_is_covered_once_by_what_megatron_builds_on_all_ranks(walked):
    name, found = walked
    architecture, layout, held = architecture_of(name), RECIPES[name], dict(found.held)
    shapes = hf_shapes(architecture)
    assert found.ranks == RANKS[name]
    covered: Counter[str] = Counter()
    for entry in parameters(architecture, layout):
        shards = held.pop((entry.pp_rank, entry.chunk, entry.name, entry.ep_rank))
        ranks = layout.tp if entry.ep_rank is None else layout.etp
        assert sorted(shards) == list(range(ranks))
        joined = entry.rule.join([shards[rank] for rank in range(ranks)])
        assert [tuple(tensor.shape) for tensor in joined] == [shapes[name] for name in entry.hf_names]
        if isinstance(entry.rule, Vocabulary):
            assert sum(len(shard) for shard in shards.values()) == padded_vocabulary(architecture, layout.tp)
        covered.update(entry.hf_names if entry.exported else ())
    assert not held
    assert covered == Counter(shapes.keys())


def test_what_all_ranks_ask_megatrons_files_for_is_what_conversion_writes(walked):
    name, found = walked
    written = {t.key: t for stored in stored_parameters(architecture_of(name)) for t in stored.tensors}
    assert found.asked.keys() == written.keys()
    for key, stored in written.items():
        wholes = {whole for _, whole in found.asked[key].values()}
        rows = len(stored.counts)
        shape = stored.counts + stored.shape
        if stored.padded:
            shape = (padded_vocabulary(architecture_of(name), RECIPES[name].tp), *shape[rows + 1 :])
        assert wholes == {shape}
        assert sum(prod(part) for part, _ in found.asked[key].values()) == prod(shape)


@pytest.mark.parametrize("name", RECIPES)
def test_every_tensor_has_one_place_in_megatrons_files(name):
    architecture = architecture_of(name)
    shapes = hf_shapes(architecture)
    table = stored_parameters(architecture)
    assert len({(stored.key, stored.index) for stored in table}) == len(table)
    assert Counter(name for stored in table for name in stored.parameter.hf_names) == Counter(shapes.keys())
    numbers = sum(prod(stored.shape) for stored in table)
    assert numbers == sum(prod(shape) for shape in shapes.values())
    assert numbers / 1e9 == pytest.approx(NUMBERS[name], abs=0.1)
