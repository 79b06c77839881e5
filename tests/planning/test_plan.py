"""What `exprl plan` answers, on published models and on a run's directory."""

import io
import json
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from exprl_megatron.cli import app
from exprl_megatron.config.policy import Layout, OptimizerConfig, PolicyConfig
from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.errors import UserError
from exprl_megatron.inspection.plan_vs_run import compare_run
from exprl_megatron.planning import memory
from exprl_megatron.planning.hardware import GIB, GPUS
from exprl_megatron.planning.layouts import legal_layouts
from exprl_megatron.planning.memory import host_memory, kv_bytes_per_token, server_memory, training_memory
from exprl_megatron.planning.overrides import overrides
from exprl_megatron.planning.plan_json import plan_to_dict
from exprl_megatron.planning.plan_report import KINDS, print_plan
from exprl_megatron.planning.plan_request import plan_target
from exprl_megatron.planning.targets import find_architecture, find_config
from exprl_megatron.runs.directory import RunDirectory

H100 = GPUS["h100"]
LLAMA_70B = find_architecture("llama-3.3-70b")[0]
ADAM = OptimizerConfig()
QWEN_MOE = find_architecture("qwen3-235b-a22b")[0]
NVIDIAS = Layout(tp=4, pp=4, vpp=5, cp=2, dp=2, sequence_parallel=True)
"""NVIDIA's published layout of a 70B on 64 H100, sequences of 8,192 in micro-batches of one."""


def policy(layout=NVIDIAS, precision="bf16", **changes) -> PolicyConfig:
    return PolicyConfig(model="none", layout=layout, precision=precision, **changes)


def peak(config: PolicyConfig, optimizer=ADAM):
    stages = range(config.layout.pp)
    return max(
        (training_memory(LLAMA_70B, config, optimizer, stage, 64, H100) for stage in stages), key=lambda m: m.total
    )


@pytest.mark.parametrize("precision", ["bf16", "fp8-delayed"])
def test_what_nvidia_ran_on_80_gb_fits(precision):
    assert 40 * GIB < peak(policy(precision=precision)).total < H100.memory_bytes * memory.USABLE


def test_what_cannot_be_held_does_not_fit():
    """70.6e9 parameters over 8 GPUs: 18 bytes of state each make 148 GiB of a GPU."""
    alone = peak(policy(Layout(tp=8, sequence_parallel=True)))
    state = alone.weights + alone.gradients + alone.optimizer
    assert state == pytest.approx(70.55e9 / 8 * 18, rel=1e-3)
    assert alone.excess_bytes(H100) > 60 * GIB


def test_state_of_a_rank_is_that_of_the_papers_on_optimizer_sharding():
    """ZeRO stage 1 in mixed precision: 2 + 4 + 12 / shards bytes a parameter, fp32 gradients (arXiv 1910.02054)."""
    held = memory.resident_memory(LLAMA_70B, policy(), OptimizerConfig(), 1)
    parameters = held.weights / 2
    assert held.gradients == 4 * parameters
    assert held.optimizer == 12 * parameters / 4
    assert (
        memory.resident_memory(LLAMA_70B, policy(), OptimizerConfig(distributed=False), 1).optimizer == 12 * parameters
    )


def test_experts_are_sharded_over_their_own_data_parallelism():
    layout = Layout(ep=8, dp=64)
    counts = memory.rank_counts(QWEN_MOE, layout, 0)
    assert layout.edp == 8
    sharded = memory.optimizer_bytes(counts, policy(layout), OptimizerConfig())
    assert sharded == pytest.approx(12 * (counts.dense / 64 + counts.experts / 8))


def test_an_offloaded_optimizer_moves_to_the_host():
    half = OptimizerConfig(offload=0.5)
    whole = peak(policy()).optimizer
    assert peak(policy(), half).optimizer == pytest.approx(whole / 2)
    last = NVIDIAS.pp - 1
    fullest = max(range(NVIDIAS.pp), key=lambda r: memory.rank_counts(LLAMA_70B, NVIDIAS, r).total)
    assert fullest in (0, last)
    assert host_memory(LLAMA_70B, policy(), half, fullest, False).optimizer == pytest.approx(whole / 2, rel=1e-3)


def test_fp8_keeps_copies_unless_parameters_are_8_bits_themselves():
    beside = peak(policy(precision="fp8-tensorwise"))
    instead = peak(policy(precision={"kind": "fp8-tensorwise", "fp8_parameters": True}))
    assert beside.fp8_copies > 0 and instead.fp8_copies == 0
    assert beside.weights + beside.fp8_copies > 1.8 * instead.weights


def test_the_tile_of_logits_is_the_policys():
    # Imported here: the planner itself must do without torch and Megatron.
    from exprl_megatron.policy import log_probs

    assert (memory.TILE_BYTES, memory.TILE_ROWS) == (log_probs.TILE_BYTES, log_probs.TILE_ROWS)


def test_cache_of_a_token_is_the_published_one():
    """Llama 3 70B: 2 x 80 layers x 8 groups x 128 x 2 bytes are 320 KiB; more GPUs than groups repeat groups."""
    assert kv_bytes_per_token(LLAMA_70B, 1) == 320 * 1024
    assert kv_bytes_per_token(LLAMA_70B, 8) == kv_bytes_per_token(LLAMA_70B, 16) == 40 * 1024


def test_a_server_that_cannot_hold_its_weights_is_named():
    with pytest.raises(UserError, match=r"tp 1 needs \d+\.\d GiB more than a H100"):
        server_memory(LLAMA_70B, ServerConfig(tp=1), H100)
    assert server_memory(LLAMA_70B, ServerConfig(tp=4), H100).kv_cache > 0


@pytest.mark.parametrize(("architecture", "gpus"), [(LLAMA_70B, 64), (QWEN_MOE, 128)])
def test_every_listed_layout_uses_all_gpus_and_is_legal(architecture, gpus):
    layouts = list(legal_layouts(architecture, policy(max_tokens=8192), OptimizerConfig(), H100, gpus))
    assert len(set(layouts)) == len(layouts) > 50
    assert {layout.world_size for layout in layouts} == {gpus}
    assert not [layout for layout in layouts if layout.violations(None)]
    assert max(layout.tp for layout in layouts) <= 8


def test_the_best_layout_for_a_70b_on_64_h100_is_nvidias_but_for_virtual_stages():
    best = plan_target("llama-3.3-70b", [], H100, gpus=64, train_only=True).ranking.layouts[0]
    assert best.layout.model_copy(update={"vpp": 5}) == NVIDIAS
    assert best.policy.recompute == "none"


def test_gpus_are_divided_between_trainer_and_servers():
    found = plan_target("qwen3-32b", [], H100, gpus=32, judge="qwen3-4b")
    assert sum(found.gpus.values()) == 32 and set(found.gpus) == {"trainer", "policy server", "judge server"}
    assert not found.faults
    assert [phase.name for phase in found.phases] == ["sample", "judge", "log-probs", "train", "reshard", "save"]
    assert found.step_s == pytest.approx(sum(phase.seconds for phase in found.phases))
    json.dumps(plan_to_dict(found, top=3))
    again = plan_target("qwen3-32b", overrides(found), H100, judge="qwen3-4b")
    assert again.step_s == pytest.approx(found.step_s) and again.gpus == found.gpus


def test_a_judge_on_the_policys_servers_takes_no_gpus_and_begins_when_all_is_sampled():
    settings = ["policy.layout.dp=4", "judge.placement=policy"]
    found = plan_target("qwen3-8b", settings, H100, judge="qwen3-8b")
    (judge,) = (phase for phase in found.phases if phase.name == "judge")
    assert found.gpus.keys() == {"trainer", "policy server"}
    assert judge.device == "policy server" and judge.seconds == judge.busy_s > 0
    assert any("load the judge's weights is not predicted" in note for note in found.notes)


def test_a_config_gets_the_gpus_that_it_is_given():
    found = plan_target("recipes/configs/paper/qwen3-4b-outcome.yaml", [], H100, gpus=32)
    assert sum(found.gpus.values()) == 32 and not found.faults
    as_written = plan_target("recipes/configs/paper/qwen3-4b-outcome.yaml", [], H100)
    assert found.step_s < as_written.step_s
    again = plan_target("recipes/configs/paper/qwen3-4b-outcome.yaml", overrides(found), H100)
    assert again.config.policy.layout == found.config.policy.layout and again.gpus == found.gpus


def test_speeds_are_those_of_the_seconds_beside_them():
    found = plan_target("qwen3-8b", ["policy.layout.dp=4", "judge.server.count=2"], H100, judge="qwen3-8b")
    phases = {phase.name: phase for phase in found.phases}
    assert set(phases) == {"sample", "judge", "log-probs", "train", "reshard", "save"}
    work, train = found.workload, phases["train"]
    assert train.speed.tokens_per_s_per_gpu * train.seconds * 4 == pytest.approx(work.tokens)
    answers = work.problems * work.traces * work.response_tokens
    assert phases["sample"].speed.tokens_per_s_per_gpu * phases["sample"].seconds == pytest.approx(answers)
    assert phases["judge"].busy_s >= phases["judge"].seconds
    for name in ("sample", "judge", "log-probs", "train"):
        assert 0 < phases[name].speed.mfu < 1 and "BF16 989" in phases[name].speed.peak
    assert train.speed.mfu == pytest.approx(found.trainer.mfu)


def test_every_kind_of_memory_has_its_column():
    layout = ["policy.layout.pp=2", "policy.layout.tp=2", "policy.layout.dp=2", "policy.layout.sequence_parallel=true"]
    found = plan_target("qwen3-8b", [*layout, "policy.precision=fp8-tensorwise"], H100)
    kinds = {field.name for field in fields(memory.Memory)}
    assert set(KINDS) == kinds
    record = plan_to_dict(found, top=1)
    for phase in record["phases"]:
        assert phase["memory"]["total"] == pytest.approx(sum(phase["memory"][kind] for kind in kinds))
    first, last = record["trainer"]["stages"]
    assert first["logits"] == 0 < last["logits"]
    assert first["communication"] > 0 and first["fp8_copies"] > 0
    train = next(phase for phase in record["phases"] if phase["name"] == "train")
    assert train["memory"]["total"] == max(first["total"], last["total"])


@pytest.mark.parametrize(
    ("model", "replay", "token_bytes"),
    [("qwen3-30b-a3b", "true", 48 * 8), ("qwen3-30b-a3b", "false", 0), ("qwen3-8b", "null", 0)],
)
def test_the_experts_of_a_step_are_counted_in_rank_0_s_memory(model, replay, token_bytes):
    found = plan_target(model, [f"policy.router_replay={replay}", "policy.layout.dp=16"], H100)
    assert found.routed_experts == token_bytes * found.workload.tokens
    console = Console(width=160, record=True, file=io.StringIO())
    print_plan(found, console, top=1)
    assert ("router replay:" in console.export_text()) == bool(token_bytes)


def test_a_precision_that_the_gpu_lacks_is_the_reason_given():
    with pytest.raises(UserError, match="mxfp8, which H100 SXM does not run"):
        plan_target("llama-3.3-70b", ["policy.precision=mxfp8"], H100, gpus=64)


def test_the_offloaded_optimizer_is_reported():
    found = plan_target("qwen3-8b", ["policy.layout.dp=8", "stages.0.optimizer.offload=0.5"], H100, train_only=True)
    assert found.host.optimizer == pytest.approx(found.trainer.memory.optimizer)
    console = Console(width=160, record=True, file=io.StringIO())
    print_plan(found, console, top=1)
    assert f"optimizer on the host: {found.host.optimizer / GIB:.1f} GiB" in console.export_text()


def test_a_config_keeps_its_layout_and_says_what_is_too_much():
    small = plan_target("recipes/configs/paper/qwen3-4b-process-delta.yaml", [], H100)
    assert small.gpus == {"trainer": 6, "policy server": 6, "judge server": 2}
    assert not small.faults and small.ref_policy["host_swap_s"] > 0
    large = plan_target("llama-3.3-70b", ["policy.layout.tp=8", "policy.layout.sequence_parallel=true"], H100)
    assert [fault.split(":")[0] for fault in large.faults] == ["sample", "train", "reshard", "save"]
    assert "raise policy.layout.dp, or set optimizer.offload" in large.faults[1]


def test_a_starting_policy_on_a_server_has_gpus_of_its_own():
    start = ["stages.0.loss.kl_coefficient=0.001", "server.tp=8", "policy.layout.dp=1"]
    host = plan_target("qwen3-32b", start, H100)
    server = plan_target("qwen3-32b", [*start, "policy.ref_policy=server"], H100)
    assert server.gpus["ref server"] == 8 and "ref server" not in host.gpus
    assert server.ref_policy == host.ref_policy, "either plan tells what both choices cost"
    cost, seconds = host.ref_policy, {phase.name: phase.seconds for phase in (*host.phases, *server.phases)}
    # 32.76e9 parameters in bf16 over 8 GPUs, and on the host both sets of them over the trainer's ranks.
    assert cost["server_weight_bytes_per_gpu"] == pytest.approx(32.76e9 * 2 / 8, rel=2e-3)
    ranks = host.config.policy.layout.tp * host.config.policy.layout.pp
    assert cost["host_bytes_per_rank"] == pytest.approx(2 * 32.76e9 * 2 / ranks, rel=0.05)
    assert seconds["log-probs"] == pytest.approx(cost["host_swap_s"] + cost["host_score_s"])
    assert seconds["ref log-probs"] == cost["server_score_s"]
    assert {phase.name for phase in server.phases} - {phase.name for phase in host.phases} == {"ref log-probs"}
    assert "log-probs" not in {phase.name for phase in server.phases}


def test_nothing_to_plan_is_one_sentence():
    with pytest.raises(UserError, match=r"did you mean llama-3\.3-70b"):
        find_config("lama-3.3-70b", [])
    with pytest.raises(UserError, match=r"take 3,941 GiB at least, and 601 GiB may be filled"):
        plan_target("qwen3-235b-a22b", [], H100, gpus=8, train_only=True)


@pytest.mark.parametrize(("longest", "faults"), [(40960, 0), (40961, 1)])
def test_traces_that_are_longer_than_the_model_has_positions_do_not_fit(longest, faults):
    found = plan_target(
        "qwen3-8b", ["policy.layout.dp=8", f"policy.max_tokens={longest}"], GPUS["b200"], train_only=True
    )
    assert [fault for fault in found.faults if "more than the 40960 positions" in fault] == found.faults
    assert len(found.faults) == faults


def test_the_command_prints_json():
    answer = CliRunner().invoke(app, ["plan", "qwen3-8b", "--gpus", "8", "--train-only", "--json", "--top", "2"])
    record = json.loads(answer.output)
    assert record["fits"] and len(record["ranking"]["layouts"]) == 2
    assert record["trainer"]["peak"].startswith("H100 SXM dense BF16")


def test_a_run_is_compared_with_its_own_lengths(tmp_path):
    config, _ = find_config("qwen3-4b", ["policy.layout.dp=8"])
    directory = RunDirectory(tmp_path)
    directory.config.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    clocks = {"sample_and_grade": 100.0, "train": 20.0, "sync": 2.0, "step": 130.0}
    steps = [
        {"length/mean": 1000.0, "tokens": 2e6}
        | {f"seconds/{name}": value * (1 + step) for name, value in clocks.items()}
        for step in range(3)
    ]
    records = [{"stage": "rl", "step": i + 1, "wall_s": 1.0, "metrics": step} for i, step in enumerate(steps)]
    directory.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = {row.phase: row for row in compare_run(config, directory, H100)}
    assert {name: row.measured_s for name, row in rows.items()} == {
        "sample and judge": 200.0,
        "train": 40.0,
        "reshard": 4.0,
        "step": 260.0,
    }
    assert rows["train"].ratio == pytest.approx(rows["train"].predicted_s / 40.0)


def test_every_published_configuration_can_be_planned():
    for model in sorted(Path(memory.__file__).parent.joinpath("architectures").iterdir()):
        if find_architecture(model.name)[0].experts is None:
            assert plan_target(model.name, [], GPUS["b200"], gpus=16, train_only=True).ranking.layouts


def test_of_pipelines_that_are_as_fast_the_one_with_most_room_is_listed():
    best = plan_target("llama-3.3-70b", [], H100, gpus=64, train_only=True).ranking.layouts[0]
    others = [
        plan_target(
            "llama-3.3-70b", [f"policy.layout.{k}={v}" for k, v in layout.model_dump().items()], H100, train_only=True
        )
        for layout in (best.layout.model_copy(update={"vpp": vpp}) for vpp in (1, 2, 4, 5, 10, 20))
    ]
    as_fast = [other.trainer for other in others if other.trainer.seconds < 1.005 * best.seconds]
    assert len(as_fast) > 1
    assert best.memory.total == min(other.memory.total for other in as_fast)


def test_gated_delta_nets_are_planned_with_their_servers():
    assert plan_target("qwen3.5-27b", [], H100, gpus=64).ranking.layouts
