"""Memory of a plan whose trainer and sampling servers share GPUs."""

from pathlib import Path

import pytest

from exprl_megatron.config.load import check_config
from exprl_megatron.launch.launcher import required_servers
from exprl_megatron.planning.hardware import GIB, GPUS
from exprl_megatron.planning.memory import CONTEXT, GROUP
from exprl_megatron.planning.plan import plan, ranked
from exprl_megatron.planning.targets import find_config
from exprl_megatron.planning.workload import workload_of
from exprl_megatron.runs.directory import RunDirectory
from exprl_megatron.serving.server_command import server_command

H100 = GPUS["h100"]
ALMOST_FULL = "policy.micro_batch_tokens=10112"
"""With it a rank of four needs 75.0 of the 75.1 GiB that may be filled."""


def planned(*changes: str):
    config, _ = find_config(
        "qwen3-4b", ["policy.layout.dp=4", "server.count=4", "placement.kind=colocated", *changes], "qwen3-4b"
    )
    stage = config.stages[0]
    return plan(config, stage, workload_of(config, stage), H100)


def phases(found):
    return {phase.name: phase.memory for phase in found.phases}


def test_colocated_servers_fill_three_quarters_and_the_sides_know_of_each_other():
    found = planned()
    memory, apart = phases(found), phases(planned("placement.kind=separate"))
    assert memory["sample"].weights + memory["sample"].kv_cache == pytest.approx(0.75 * H100.memory_bytes)
    assert memory["sample"].kv_cache < apart["sample"].kv_cache
    # Data parallelism, and the world.
    assert memory["sample"].asleep == CONTEXT + 2 * GROUP
    assert memory["train"].asleep == CONTEXT + GIB, "a context and CUDA graphs"
    assert memory["train"].total - apart["train"].total == memory["train"].asleep
    assert memory["reshard"].gradients == memory["reshard"].optimizer == 0
    assert memory["reshard"].asleep - memory["train"].asleep == pytest.approx(memory["reshard"].weights, rel=0.02), (
        "both sides hold their weights while they travel"
    )
    assert not any(one.asleep for one in apart.values())


def test_what_is_away_while_servers_sample_is_in_host_memory():
    found, trained = planned(), phases(planned())["train"]
    assert found.workload.keeps_ref_policy and found.host.ref_policy == 2 * trained.weights
    assert found.host.asleep == pytest.approx(trained.optimizer), "the weights wait where those of the start do"
    alone = planned("stages.0.loss.kl_coefficient=0").host
    assert alone.ref_policy == 0 and alone.asleep == pytest.approx(trained.weights + trained.optimizer)
    assert planned("placement.kind=separate").host.asleep == 0


def test_a_fraction_that_leaves_the_sleeping_trainer_no_room_is_a_fault():
    assert not any("mem_fraction_static" in fault for fault in planned().faults)
    (fault,) = planned("server.mem_fraction_static=0.9").faults
    assert planned("server.extra_args=[--mem-fraction-static=0.9]").faults == [fault]
    assert fault.startswith("sample: with server.mem_fraction_static 0.9 ") and fault.endswith("lower it.")
    assert any(
        "sample: A server" in fault and "raise either" in fault
        for fault in planned("server.mem_fraction_static=0.05").faults
    )


def test_a_layout_that_fits_without_the_sleeping_servers_alone_is_a_fault():
    assert not planned("placement.kind=separate", ALMOST_FULL).faults
    (fault,) = planned(ALMOST_FULL).faults
    assert fault.startswith("train: a trainer rank needs 2.4 GiB more")


def test_the_servers_are_started_with_what_was_planned(tmp_path, monkeypatch):
    monkeypatch.setattr("exprl_megatron.launch.launcher.uses_cuda", lambda: True)

    def options(**changes) -> dict[str, str]:
        stage = {"kind": "sparse-rl", "name": "s", "steps": 1, "problems": {"source": "p"}}
        tree = {"directory": str(tmp_path), "policy": {"model": "m"}, "stages": [stage]}
        (spec,) = required_servers(check_config(tree | changes, "test"), RunDirectory(tmp_path))
        words = server_command(Path("m"), spec.config, dtype="bfloat16", port=1, seed=0, weight_version="v", cuda=True)
        return {word: follows for word, follows in zip(words, [*words[1:], ""], strict=True) if word.startswith("--")}

    colocated = {"placement": {"kind": "colocated"}}
    assert options(**colocated)["--mem-fraction-static"] == "0.75"
    assert "--enable-memory-saver" in options(**colocated)
    assert options(**colocated, server={"mem_fraction_static": 0.6})["--mem-fraction-static"] == "0.6"
    assert options(server={"mem_fraction_static": 0.6})["--mem-fraction-static"] == "0.6"
    assert "--mem-fraction-static" not in options(), "SGLang chooses"
    assert (
        options(**colocated, server={"extra_args": ["--mem-fraction-static", "0.5"]})["--mem-fraction-static"] == "0.5"
    )


def test_the_best_layouts_of_a_colocated_run_leave_the_sleeping_servers_room():
    def best(kind: str):
        config, _ = find_config("qwen3-4b", [f"placement.kind={kind}", ALMOST_FULL], "qwen3-4b")
        stage = config.stages[0]
        return ranked(config, stage, workload_of(config, stage), H100, 4)

    room = 0.95 * H100.memory_bytes
    assert max(one.memory.total for one in best("colocated").layouts) <= room - 0.95 * (CONTEXT + GIB)
    assert room - 0.95 * (CONTEXT + GIB) < max(one.memory.total for one in best("separate").layouts) <= room
