"""Shards of all ranks become whole tensors on any rank: joined in order, without the vocabulary's padding.

Sends and receives are carried out by hand; real ranks do the same in the slow tests of layouts.
"""

from dataclasses import replace

import pytest
import torch
from helpers.loaded_shards import architecture_of, shards

from exprl_megatron.config.policy import Layout
from exprl_megatron.models.name_map import hf_shapes, parameters
from exprl_megatron.models.shards import holders
from exprl_megatron.policy import gather
from exprl_megatron.policy.gather import Gatherer
from exprl_megatron.policy.world import World

CASES = [
    ("qwen3", Layout(tp=2), (0, 1)),
    ("qwen2", Layout(tp=2, dp=2), (2, 3)),
    ("llama", Layout(tp=2), (0, 1)),
    ("seed-oss", Layout(tp=2, pp=2), (0, 3)),
    ("qwen3-moe", Layout(dp=4, ep=2, etp=2), (0, 1)),
    ("qwen3-moe", Layout(tp=2, ep=2, sequence_parallel=True), (1,)),
]


class Numbered:
    """A model's tensors, in which no two numbers of one tensor are alike."""

    def __init__(self, shapes):
        self._tensors = {name: torch.arange(torch.Size(shape).numel()).view(shape).float() for name, shape in shapes}

    def read(self, name, dim=0, start=0, stop=None):
        tensor = self._tensors[name]
        return tensor[start:stop] if dim == 0 else tensor[:, start:stop]


@pytest.mark.parametrize(("family", "layout", "roots"), CASES)
def test_shards_become_the_tensors_that_they_were_cut_from(tiny_model, monkeypatch, family, layout, roots):
    # Llama's words need no padding, so that every shard of them is received where it belongs.
    words = 128 if family == "llama" else 127
    architecture = replace(architecture_of(tiny_model, family), layers=layout.pp, vocabulary=words)
    shapes = hf_shapes(architecture)
    source = Numbered(shapes.items())
    held = shards(architecture, layout, source)
    for root in roots:
        gatherer = Gatherer.__new__(Gatherer)
        gatherer._world = World(layout, torch.device("cpu"), root, tp_rank=0, pp_rank=0, dp_rank=0)
        gatherer._scratch, gatherer.shapes, gatherer.dtype = torch.empty(0), shapes, torch.float32
        gatherer.own = held[root].__getitem__
        for parameter in parameters(architecture, layout):
            if not parameter.exported:
                continue
            senders = []

            def receive(tensor, src, parameter=parameter, senders=senders):
                senders.append(src)
                assert tensor.is_contiguous()
                tensor.copy_(held[src][parameter])

            monkeypatch.setattr(gather.dist, "recv", receive)
            into = [torch.full(shapes[name], torch.nan) for name in parameter.hf_names]
            gatherer.collect(parameter, root, into)
            assert senders == [rank for rank in holders(parameter, layout) if rank != root]
            for name, tensor in zip(parameter.hf_names, into, strict=True):
                assert torch.equal(tensor, source.read(name)), (root, name)


@pytest.mark.parametrize(("rank", "sends"), [(0, True), (1, True), (2, False)])
def test_the_first_copy_of_each_shard_is_sent_to_the_root_and_other_ranks_do_nothing(
    tiny_model, monkeypatch, rank, sends
):
    layout = Layout(tp=2, dp=2)
    architecture = replace(architecture_of(tiny_model, "qwen3"), layers=1)
    held = shards(architecture, layout, Numbered(hf_shapes(architecture).items()))
    (parameter,) = (p for p in parameters(architecture, layout) if p.name.endswith("linear_fc2.weight"))
    gatherer = Gatherer.__new__(Gatherer)
    gatherer._world = World(layout, torch.device("cpu"), rank, tp_rank=0, pp_rank=0, dp_rank=0)
    gatherer.own = held[rank].__getitem__
    sent = []
    monkeypatch.setattr(gather.dist, "send", lambda tensor, dst: sent.append((tensor, dst)))
    gatherer.collect(parameter, 3, None)
    assert len(sent) == sends
    for tensor, dst in sent:
        assert dst == 3 and tensor.is_contiguous() and torch.equal(tensor, held[rank][parameter])
