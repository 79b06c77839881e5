"""Models of 32 to 235 billion parameters, walked on the meta device: every rank that their layout has."""

from collections import Counter
from pathlib import Path

import pytest

from exprl_megatron import planning
from exprl_megatron.config.policy import Layout, PolicyConfig
from exprl_megatron.conversion.stored import stored_parameters
from exprl_megatron.policy.architecture import Architecture, padded_vocabulary, read_architecture
from exprl_megatron.policy.meta import meta_chunks, pretend_world
from exprl_megatron.resharding.names import Vocabulary, hf_shapes, parameters

pytestmark = pytest.mark.slow

LAYOUTS = {
    "llama-3.3-70b": Layout(tp=4, pp=4, vpp=2, sequence_parallel=True),
    "qwen2.5-72b": Layout(tp=8, pp=2, sequence_parallel=True),
    "qwen3-32b": Layout(tp=4, pp=2, sequence_parallel=True),
    "qwen3-235b-a22b": Layout(
        tp=2, pp=4, dp=4, ep=8, sequence_parallel=True, embedding_as_layer=True, head_as_layer=True
    ),
}
NUMBERS = {"llama-3.3-70b": 70.6, "qwen2.5-72b": 72.7, "qwen3-32b": 32.8, "qwen3-235b-a22b": 235.1}
"""Billions, as published in the model cards."""


def built(architecture: Architecture, layout: Layout) -> dict[tuple, dict[int, object]]:
    """Every parameter of every rank on meta: (pp, chunk, name, ep or None) -> by tensor-parallel rank."""
    config = PolicyConfig(model="none", precision="bf16", layout=layout)
    found: dict[tuple, dict[int, object]] = {}
    for rank in range(layout.world_size):
        with pretend_world(layout, rank) as world:
            for index, chunk in enumerate(meta_chunks(architecture, config, world)):
                for name, parameter in chunk.named_parameters():
                    expert = ".experts." in name
                    place = (world.pp_rank, index, name, world.ep_rank if expert else None)
                    cut = world.etp_rank if expert else world.tp_rank
                    earlier = found.setdefault(place, {}).setdefault(cut, parameter)
                    assert earlier.shape == parameter.shape
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_tensor_is_covered_once_by_what_megatron_builds_on_all_ranks(name):
    architecture = read_architecture(Path(planning.__file__).parent / "architectures" / name)
    layout, shapes = LAYOUTS[name], hf_shapes(architecture)
    held = built(architecture, layout)
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


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_tensor_has_one_place_in_megatrons_files(name):
    architecture = read_architecture(Path(planning.__file__).parent / "architectures" / name)
    shapes = hf_shapes(architecture)
    table = stored_parameters(architecture)
    assert len({(stored.key, stored.index) for stored in table}) == len(table)
    assert Counter(name for stored in table for name in stored.parameter.hf_names) == Counter(shapes.keys())
    numbers = sum(size_of(stored.shape) for stored in table)
    assert numbers == sum(size_of(shape) for shape in shapes.values())
    assert numbers / 1e9 == pytest.approx(NUMBERS[name], abs=0.1)


def size_of(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)
