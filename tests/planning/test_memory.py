"""Bytes of a plan beside what Megatron builds and torch saves."""

from dataclasses import replace
from pathlib import Path

import pytest
from helpers.meta import meta_chunks, pretend_world

from exprl_megatron import planning
from exprl_megatron.config.policy import Layout, PolicyConfig
from exprl_megatron.models.architecture import read_architecture
from exprl_megatron.planning.parameters import largest_tensor, model_parameters, rank_counts

PUBLISHED = Path(planning.__file__).parent / "architectures"


def stage_ranks(layout: Layout) -> list[int]:
    """One rank of every pipeline stage, each at another place within it."""
    within = layout.world_size // layout.pp
    return [stage * within + (7 * stage + within - 1) % within for stage in range(layout.pp)]


def slow(*values):
    """Values of a case that takes seconds."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        slow("llama-3.3-70b", Layout(tp=4, pp=4, vpp=5, cp=2, dp=2, sequence_parallel=True)),
        ("qwen2.5-72b", Layout(tp=8, pp=2, dp=4, sequence_parallel=True)),
        ("qwen3-32b", Layout(tp=2, pp=3, dp=2, embedding_as_layer=True, head_as_layer=True)),
        ("qwen3-4b", Layout(tp=4, pp=2, dp=1, sequence_parallel=True)),
        ("qwen3-4b", Layout(tp=2, dp=3, sequence_parallel=True)),
        ("qwen3-30b-a3b", Layout(tp=4, pp=2, ep=8, etp=2, dp=4, sequence_parallel=True)),
        slow("qwen3-235b-a22b", Layout(pp=8, vpp=4, ep=32, dp=32, embedding_as_layer=True, head_as_layer=True)),
        ("seed-oss-36b", Layout(tp=8, pp=4, sequence_parallel=True)),
        (
            "glm-4.5-air",
            Layout(tp=2, pp=4, ep=32, dp=16, sequence_parallel=True, embedding_as_layer=True, head_as_layer=True),
        ),
        ("mixtral-8x7b", Layout(tp=2, pp=2, ep=4, etp=1, dp=2, sequence_parallel=True)),
        ("qwen3.5-35b-a3b", Layout(tp=2, pp=2, ep=8, dp=4, sequence_parallel=True)),
        ("qwen3.5-27b", Layout(tp=4, pp=2, vpp=3, sequence_parallel=True, embedding_as_layer=True, head_as_layer=True)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"tp{value.tp}pp{value.pp}vpp{value.vpp}ep{value.ep}",
)
def test_parameters_of_every_stage_are_those_that_megatron_builds(model, layout):
    architecture = read_architecture(PUBLISHED / model)
    policy = PolicyConfig(model=model, layout=layout, precision="bf16")
    for rank in stage_ranks(layout):
        with pretend_world(layout, rank) as world:
            chunks = meta_chunks(architecture, policy, world)
            found = sum(p.numel() for chunk in chunks for p in chunk.parameters())
            experts = sum(p.numel() for c in chunks for n, p in c.named_parameters() if ".experts." in n)
        counts = rank_counts(architecture, layout, world.pp_rank)
        assert counts.total == found
        assert counts.experts == experts


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        slow("llama-3.3-70b", Layout(tp=2, pp=2, vpp=2, cp=2, sequence_parallel=True)),
        slow("qwen2.5-72b", Layout(tp=4, pp=2, sequence_parallel=True)),
        ("qwen3-32b", Layout(tp=2, pp=2, vpp=3, embedding_as_layer=True, head_as_layer=True)),
        slow("qwen3-235b-a22b", Layout(tp=2, pp=2, ep=2, etp=2, dp=2, sequence_parallel=True, head_as_layer=True)),
        slow("qwen3-235b-a22b", Layout(pp=2, cp=2, ep=2, dp=2, embedding_as_layer=True)),
    ],
    ids=["llama", "qwen2.5", "qwen3, uneven", "experts, tp and etp, uneven", "experts, cp, uneven"],
)
def test_parameters_of_every_rank_are_those_that_megatron_builds(model, layout):
    """The published widths, so many layers that each virtual stage has one or two."""
    slots = 2 * layout.stages - layout.embedding_as_layer - layout.head_as_layer
    architecture = replace(read_architecture(PUBLISHED / model), layers=slots)
    policy = PolicyConfig(model=model, layout=layout, precision="bf16")
    counts = [rank_counts(architecture, layout, stage) for stage in range(layout.pp)]
    for rank in range(layout.world_size):
        with pretend_world(layout, rank) as world:
            chunks = meta_chunks(architecture, policy, world)
            found = sum(p.numel() * p.element_size() for chunk in chunks for p in chunk.parameters())
        assert 2 * counts[world.pp_rank].total == found, rank


def test_whole_models_have_their_published_sizes():
    """Parameters as the models' own pages state them (Llama 3.3: 70.6B, Qwen2.5: 72.7B, ...)."""
    sizes = {"llama-3.3-70b": 70.55e9, "qwen2.5-72b": 72.71e9, "qwen3-32b": 32.76e9, "mixtral-8x7b": 46.70e9}
    sizes |= {"qwen3-235b-a22b": 235.09e9, "qwen3-30b-a3b": 30.53e9, "qwen3-4b": 4.02e9}
    sizes |= {"mistral-7b": 7.248e9, "mistral-small-24b": 23.57e9, "seed-oss-36b": 36.15e9, "smollm2-135m": 134.5e6}
    for name, size in sizes.items():
        assert model_parameters(read_architecture(PUBLISHED / name)) == pytest.approx(size, rel=2e-3), name


def test_the_largest_tensor_is_the_embedding():
    assert largest_tensor(read_architecture(PUBLISHED / "llama-3.3-70b")) == 128256 * 8192
