"""Shards of a model as loading cuts them, without Megatron: for tests of plans that are carried out by hand."""

from collections import defaultdict

from exprl_megatron.config.policy import Layout
from exprl_megatron.models.architecture import read_architecture
from exprl_megatron.models.name_map import hf_shapes, parameters
from exprl_megatron.models.shards import copies, holders
from exprl_megatron.models.weight_readers import read_parts

EXPERTS = Layout(tp=2, pp=2, dp=2, ep=2, etp=2, sequence_parallel=True)
CASES = [
    ("qwen3", Layout(), 1),
    ("qwen3", Layout(tp=2), 1),
    ("seed-oss", Layout(tp=2, pp=2), 2),
    ("mistral", Layout(pp=2, vpp=2, dp=2), 4),
    ("qwen3-moe", EXPERTS, 2),
    ("mixtral", Layout(dp=4, ep=2, pp=2), 1),
    ("glm4-moe", EXPERTS, 2),
    ("olmo3", Layout(tp=2, pp=2), 2),
    ("qwen3.5", Layout(), 2),
    ("qwen3.5", Layout(tp=2, pp=2), 1),
    ("qwen3.5", Layout(tp=2, dp=2), 2),
    ("qwen3.5-moe", EXPERTS, 2),
]
"""Family, the trainer's layout, ranks of a server."""


def architecture_of(tiny_model, family):
    """Return four layers and a vocabulary that padding must fill."""
    return read_architecture(tiny_model(family, vocab_size=127, layers=4))


def shards(architecture, layout, source):
    """Return each rank's parameters, as loading a model directory makes them."""
    shapes = hf_shapes(architecture)
    held = defaultdict(dict)
    for parameter in parameters(architecture, layout):
        ranks = holders(parameter, layout)
        for index, first in enumerate(ranks):
            parts = read_parts(source, parameter, shapes, index, len(ranks))
            for rank in copies(parameter, first, layout):
                held[rank][parameter] = parameter.rule.merge(parts)
    return held
