"""In which order trainer and servers give up their memory and take it again; both are scripted."""

import pytest
import torch
from helpers.scripted_run import OneRankOfResults

from exprl_megatron.config.placement import PlacementConfig
from exprl_megatron.policy.offload import TRAINING
from exprl_megatron.training.phase_switch import PhaseSwitch


class Parts:
    """Fleet, sync and offload: they write down what is asked of them."""

    def __init__(self):
        self.events = []

    def offload(self, *parts):
        self.events.append(("offload", *parts))

    def onload(self, *parts):
        self.events.append(("onload", *parts))

    def bytes_on_device(self):
        return {"weights": 2**30}

    def wake(self, tag):
        self.events.append(f"wake {tag}")

    def sleep(self):
        self.events.append("sleep")
        return True

    def push_weights(self, version):
        self.events.append(f"push {version}")
        return {"sync/gb": 1.0}


@pytest.fixture
def switch_of():
    def make(kind):
        parts, made = Parts(), PhaseSwitch.__new__(PhaseSwitch)
        made._config, made._coordinator = PlacementConfig(kind=kind), OneRankOfResults()
        made._pool = made._sync = made._offload = parts
        made._device, made._memory_stats = torch.device("cpu"), {}
        made._phase = None if kind == "colocated" else "learning"
        return made, parts.events

    return make


SAMPLING = [
    ("offload", *TRAINING),
    ("onload", "weights"),
    "wake weights",
    "push v1",
    ("offload", "weights"),
    "wake kv_cache",
]
"""The servers take memory only where the trainer has given up as much, and weights only where they have memory."""
LEARNING = ["sleep", ("onload", "weights", *TRAINING)]


def test_on_shared_devices_each_side_gives_up_its_memory_before_the_other_takes_it(switch_of):
    switch, events = switch_of("colocated")
    switch.switch_to_training()
    assert switch.sync_weights("v1") == {"sync/gb": 1.0}
    switch.switch_to_training()
    assert events == LEARNING + SAMPLING + LEARNING


def test_a_phase_that_it_is_in_already_is_not_entered_again_but_weights_are_sent_again(switch_of):
    switch, events = switch_of("colocated")
    switch.switch_to_training()
    switch.switch_to_training()
    assert events == LEARNING
    switch.sync_weights("v1")
    switch.sync_weights("v1")
    assert events == LEARNING + SAMPLING + SAMPLING


def test_on_separate_devices_weights_are_pushed_and_nothing_else_happens(switch_of):
    switch, events = switch_of("separate")
    switch.switch_to_training()
    assert switch.sync_weights("v1") == {"sync/gb": 1.0}
    switch.switch_to_training()
    assert events == ["push v1"]


def test_memory_figures_are_of_the_phases_since_they_were_last_taken(switch_of):
    switch, _ = switch_of("colocated")
    switch.switch_to_training()
    first = switch.take_memory_stats()
    assert first["memory/learning/weights"] == 1.0 and first["memory/servers_slept"] == 1.0
    assert switch.take_memory_stats() == {}
    switch.sync_weights("v1")
    assert switch.take_memory_stats().keys() == {"memory/sampling/weights", "memory/sampling/asleep"}
