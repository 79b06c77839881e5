"""Weights of a policy in several layouts reach several servers, and servers of two ranks; refusals end every rank."""

from pathlib import Path

import pytest
from helpers.forking import starter
from helpers.ranks import run_ranks
from helpers.under_nccl import faults, knows_backend

from exprl_megatron.config.policy import Layout
from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.serving.server_process import start_servers, stop_servers
from exprl_megatron.serving.server_spec import ServerSpec

pytestmark = pytest.mark.slow
TARGETS = ("two", "tp2")
UNDER_NCCL = ("TP1", "PP2", "TP2xPP2")
LAYOUTS = ("TP1", "TP2", "PP2", "VPP2xDP2", "TP2xPP2")
PARTS = ("gather", "quantize", "send", "load", "check", "seconds", "gb", "moved_gb", "gb_per_s")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """What was noticed under the backend with NCCL's behavior, over which some of the worlds go."""
    return tmp_path_factory.mktemp("records")


@pytest.fixture(scope="module")
def results(tiny_model, tmp_path_factory, records):
    logs = tmp_path_factory.mktemp("logs")
    model = tiny_model("qwen3", layers=4)
    specs = [
        ServerSpec(name, model, ServerConfig(tp=tp, max_total_tokens=4096), logs)
        for name, tp in (("first", 1), ("second", 1), ("both", 2))
    ]
    with pytest.MonkeyPatch.context() as changed:
        for name, value in knows_backend(records).items():
            changed.setenv(name, value)
        servers = start_servers(specs, starter())
    try:
        first, second, both = (
            {
                "name": server.name,
                "url": server.url,
                "key_file": server.key_file,
                "pid": server.pid,
                "first_gpu": gpu,
            }
            for server, gpu in zip(servers, (0, 1, 0), strict=True)
        )
        targets = {"two": ([first, second], 1), "tp2": ([both], 2), "sacrificed": ([both], 2), "first": ([first], 1)}
        yield run_ranks(
            Path(__file__).parent / "sync_worker.py",
            4,
            logs / "out",
            environment=knows_backend(records),
            model=tiny_model("qwen3", layers=4, seed=5),
            targets=targets,
        )
    finally:
        stop_servers(servers)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_checksums_agree_from_every_layout_to_every_server(results, layout, target):
    measured = results[f"{layout} to {target}"]
    assert measured.keys() == {"broadcast", "direct", "handles", "again"}
    for metrics in measured.values():
        assert metrics.keys() == {f"sync/{part}" for part in PARTS}
        assert metrics["sync/gb"] > 0 and metrics["sync/seconds"] > metrics["sync/check"] > 0
    assert measured["broadcast"]["sync/moved_gb"] == measured["broadcast"]["sync/gb"]


@pytest.mark.parametrize("kind", ["broadcast", "direct", "handles", "disk", "delta"])
def test_a_byte_that_changes_on_its_way_is_found_and_its_tensor_named(results, kind):
    (wrong, right), (followed, _) = results[f"wrong by {kind}"]
    assert wrong.startswith(f"WeightsDiffer: first does not hold the weights of {kind} wrong after the sync: 1 of ")
    assert "first model.layers.2.self_attn.o_proj.weight;" in wrong
    assert followed.startswith("RankZeroFailed") and right == "well"


def test_a_byte_that_changes_after_it_was_loaded_is_found_and_its_tensor_named(results):
    (wrong,), (followed,) = results["wrong after loading"]
    assert "does not hold the weights" in wrong and "first model.norm.weight;" in wrong
    assert followed.startswith("RankZeroFailed")


@pytest.mark.parametrize(
    ("layout", "target", "handles"),
    [
        (Layout(tp=2), "tp2", [1, 1]),
        (Layout(tp=2, pp=2), "tp2", [1, 1, 0, 0]),
        (Layout(pp=2), "two", [1, 1]),
        (Layout(), "tp2", [2]),
    ],
    ids=str,
)
def test_each_rank_of_a_server_opens_memory_of_its_own_gpu(results, layout, target, handles):
    assert results[f"{layout} hands to {target}"] == handles


@pytest.mark.parametrize("fails", range(4))
def test_whichever_round_is_refused_every_rank_ends_at_once(results, fails):
    assert results[f"stopped at {fails}"]["ends"] == ["ServerError", "RankZeroFailed"]
    assert results[f"stopped at {fails}"]["seconds"] < 40  # of 60 s


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", UNDER_NCCL)
def test_so_they_do_where_groups_behave_as_nccl_s_and_nothing_is_sent_that_it_could_not(
    results, records, layout, target
):
    assert results[f"{layout} to {target} under NCCL's rules"].keys() == {"broadcast", "direct", "handles", "again"}
    assert faults(records) == []


def test_several_ranks_can_fill_every_message(results):
    assert results["filled twice"] is True


def test_where_servers_refuse_shards_every_rank_continues_with_broadcasts(results):
    (said,) = results["falls back"]
    assert "weights travel by broadcast, not by direct: first" in said


def test_a_server_that_left_one_stage_s_group_ends_every_rank_with_its_words(results):
    told, followed = results["refused"]
    assert told.startswith("RequestRefused: both")
    assert followed.startswith("RankZeroFailed")


@pytest.mark.parametrize(("kind", "name"), [("direct", "second"), ("broadcast", "first")])
def test_a_server_that_dies_in_a_sync_ends_every_rank_with_its_name_and_frees_the_others(results, kind, name):
    (told, took_s), (followed, follower_s) = results[f"{kind} dies"]
    assert told.startswith(f"ServerError: {name} ") and "died or is not reachable" in told
    assert followed.startswith("RankZeroFailed")
    assert max(took_s, follower_s) < 60  # of 100 s
