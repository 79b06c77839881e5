"""The transport that a config without one gets, and what the dry run says of it."""

import pytest

from exprl_megatron.config.load import check_config
from exprl_megatron.config.transport import choose_transport
from exprl_megatron.launch.dry_run import transport_lines


def config(**changes):
    stage = {"kind": "sparse-rl", "name": "s", "steps": 1, "problems": {"source": "p"}, "loss": {"kl_coefficient": 0.1}}
    return check_config({"directory": "d", "policy": {"model": "m"}, "stages": [stage]} | changes, "test")


COLOCATED = {"placement": {"kind": "colocated"}}
OTHER_LOADER = {"server": {"extra_args": ["--custom-weight-loader=package.load"]}}


@pytest.mark.parametrize(
    ("changes", "kind", "fallback", "because"),
    [
        ({}, "direct", "broadcast", "servers that exprl starts"),
        (COLOCATED, "handles", None, "share GPUs"),
        (COLOCATED | {"sync": {"fp8": True}}, "handles", None, "share GPUs"),
        ({"sync": {"fp8": True}}, "broadcast", None, "sync.fp8"),
        (OTHER_LOADER, "broadcast", None, "--custom-weight-loader"),
        ({"sync": {"transport": "disk"}}, "disk", None, "names it"),
        ({"sync": {"transport": "direct"}}, "direct", None, "names it"),
    ],
)
def test_the_transport_follows_from_placement_and_servers(changes, kind, fallback, because):
    choice = choose_transport(config(**changes))
    assert (choice.kind, choice.fallback) == (kind, fallback)
    assert because in choice.reason


def test_a_server_on_gpus_of_its_own_gets_shards_beside_colocated_ones():
    both = config(**COLOCATED | {"policy": {"model": "m", "ref_policy": "server"}})
    assert choose_transport(both, "policy").kind == "handles"
    assert choose_transport(both, "ref").kind == "direct"
    sampling, start = transport_lines(both)
    assert sampling.startswith("Weights are sent to the sampling servers by handles (trainer and servers share GPUs")
    assert start.startswith("Weights are sent to ref-0 by direct (servers that exprl starts")


def test_a_run_that_only_reads_examples_sends_no_weights():
    sft = {"kind": "sft", "name": "s", "steps": 1, "examples": "e"}
    assert transport_lines(config(stages=[sft])) == []
