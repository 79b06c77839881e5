"""Threads that form a group of GPUs work on the rank's own GPU: a new thread's current GPU is the first one."""

from contextlib import contextmanager
from types import SimpleNamespace

import torch

from exprl_megatron.weight_sync import direct, weight_groups
from exprl_megatron.weight_sync.direct import DirectTransport
from exprl_megatron.weight_sync.weight_groups import WeightGroups


def watched(monkeypatch, module):
    """Record in order what is done on which device; returns the record."""
    events = []

    @contextmanager
    def on_device(device):
        events.append(str(device))
        yield
        events.append("left")

    monkeypatch.setattr(module, "on_device", on_device)
    monkeypatch.setattr(module, "init_group", lambda *arguments: events.append("init"))
    return events


def test_a_sender_forms_its_broadcast_group_on_its_own_gpu(monkeypatch):
    events = watched(monkeypatch, weight_groups)
    groups = WeightGroups.__new__(WeightGroups)
    groups._world, groups._size, groups._deadline_s = SimpleNamespace(device=torch.device("cuda", 3)), 3, 1.0
    groups._init_group("name", ("127.0.0.1", 1)).result(60)
    assert events == ["cuda:3", "init", "left"]


def test_a_rank_forms_the_group_of_direct_transfers_on_its_own_gpu(monkeypatch):
    events = watched(monkeypatch, direct)
    monkeypatch.setattr(direct.dist, "all_reduce", lambda tensor, group: events.append("first operation"))
    monkeypatch.setattr(direct.torch, "zeros", lambda size, device: None)
    transport = DirectTransport.__new__(DirectTransport)
    transport._world, transport._name = SimpleNamespace(device=torch.device("cuda", 5), rank=1), "name"
    transport._size, transport._deadline_s = 3, 1.0
    transport._init_group("127.0.0.1", 1).result(60)
    assert events == ["cuda:5", "init", "first operation", "left"]
