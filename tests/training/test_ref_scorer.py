"""A stage's reference policy, scored by a server of its own: the same numbers as swapped-in weights give."""

import asyncio
import json
import shutil

import pytest
from helpers.forking import starter
from helpers.runs import SAMPLING, finish, kill_when, run_config, start_ranks, write_problems

from exprl_megatron.algorithms.batch import TrainSample
from exprl_megatron.config.policy import Layout, OptimizerConfig, PolicyConfig
from exprl_megatron.config.serving import ServerConfig, SyncConfig
from exprl_megatron.errors import ServerError, UserError
from exprl_megatron.launch.dry_run import planned_processes
from exprl_megatron.launch.launcher import required_servers
from exprl_megatron.policy.checkpoint import read_extra
from exprl_megatron.policy.checkpoint_files import checkpoints
from exprl_megatron.runs.directory import RunDirectory
from exprl_megatron.runs.journal import Journal
from exprl_megatron.serving.registry import RegisteredServer, Registry
from exprl_megatron.serving.server_process import start_servers
from exprl_megatron.serving.server_spec import server_specs
from exprl_megatron.serving.static_pool import StaticPool
from exprl_megatron.training.assemble import ref_client
from exprl_megatron.training.ref_scorer import RefScorer
from exprl_megatron.weight_sync.coordinator import RankCoordinator
from exprl_megatron.weight_sync.sync import WeightSync


def three_stages(directory, model, problems, ref_policy="server", **sampling):
    """Two and three steps of sparse-reward RL with a KL term and one of self-distillation."""
    shared = {
        "problems": {"source": str(problems)},
        "problems_per_step": 2,
        "group_size": 3,
        "sampling": SAMPLING | sampling,
        "optimizer": {"lr": 1e-3},
    }
    sparse = shared | {
        "kind": "sparse-rl",
        # Without an answer that is right the bonus alone moves the weights.
        "loss": {"kl_coefficient": 0.1, "entropy_coefficient": 0.05},
    }
    teacher = {"user": "{problem} Solution: {reference}"}
    distill = shared | {"kind": "self-distill", "name": "distill", "steps": 1, "teacher_prompt": teacher}
    stages = [sparse | {"name": "one", "steps": 2}, sparse | {"name": "two", "steps": 3}, distill]
    policy = {"model": str(model), "layout": {"tp": 2}, "max_tokens": 160, "ref_policy": ref_policy}
    return run_config(directory, model, model, problems, policy=policy, stages=stages)


@pytest.mark.parametrize(("value", "reported"), [("1", 1), ("0", 0)])
def test_a_server_whose_nccl_variables_are_not_the_trainer_s_is_reported(tmp_path, monkeypatch, value, reported):
    monkeypatch.setattr("exprl_megatron.serving.shared_environment.uses_cuda", lambda: True)
    for name in ("NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE"):
        monkeypatch.delenv(name, raising=False)
    registry, said = Registry(tmp_path / "servers"), []
    nccl = f"NCCL_CUMEM_ENABLE={value} NCCL_NVLS_ENABLE=0"
    registry.register(RegisteredServer("ref", "ref-0", "http://127.0.0.1:9", "", "a", nccl=nccl))
    client = ref_client(three_stages(tmp_path / "run", "model", "problems"), registry, said.append)

    async def ask():
        async with client:
            for _ in range(2):
                with pytest.raises(ServerError):
                    await client.health()

    asyncio.run(ask())
    assert len(said) == reported and all("NCCL_CUMEM_ENABLE=1" in line and "ref-0" in line for line in said)


def test_the_server_is_among_the_processes_only_where_a_stage_needs_it(tmp_path):
    def names(ref_policy):
        config = three_stages(tmp_path / "run", "model", "problems", ref_policy)
        planned = [process.name for process in planned_processes(config) if "server" in process.what.lower()]
        assert planned == [spec.name for spec in required_servers(config, RunDirectory(tmp_path))]
        return planned

    assert names("server") == ["policy-0", "ref-0"]
    assert names("host") == ["policy-0"]


def test_another_temperature_than_1_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"stage one: .*temperature is 0.7; set ref_policy to host"):
        three_stages(tmp_path / "run", "model", "problems", temperature=0.7)
    three_stages(tmp_path / "run", "model", "problems", "host", temperature=0.7)


@pytest.fixture(scope="module")
def ref_server(tiny_model, tmp_path_factory):
    """The server of its own; what weights it holds is each test's matter."""
    config = ServerConfig(request_deadline_s=120, max_total_tokens=16384)
    specs = server_specs("ref", tiny_model("qwen3"), config, tmp_path_factory.mktemp("logs"))
    with start_servers(specs, starter())[0] as server:
        yield server


@pytest.mark.slow
def test_the_server_s_log_probs_are_those_of_the_weights_at_the_stage_s_begin(ref_server, tiny_model):
    from exprl_megatron.algorithms.objective import supervised_objective
    from exprl_megatron.policy.policy import Policy
    from exprl_megatron.policy.world import enter_world, leave_world
    from exprl_megatron.weight_sync.broadcast import BroadcastTransport

    sequences = [TrainSample(tuple(range(3, 4 + i)), tuple(range(90, 60 - 5 * i, -1))) for i in range(5)]
    tokens = sum(len(sequence.response_ids) for sequence in sequences)

    def learn():
        policy.accumulate(sequences, supervised_objective(), 1.0, denominator=tokens)
        policy.apply_update()

    enter_world(Layout())
    policy = Policy(PolicyConfig(model=str(tiny_model("qwen3"))), seed=0)
    policy.begin_stage(OptimizerConfig(lr=1e-2), total_steps=10)
    learn()
    coordinator, client = RankCoordinator(240.0), ref_server.client()
    transport = BroadcastTransport([client], 1, policy.world, coordinator, 120.0)
    sync = WeightSync(SyncConfig(), policy, coordinator, StaticPool([client]), transport)
    scorer = RefScorer(client, sync, coordinator, start_deadline_s=60.0)
    scorer.open()
    policy.begin_stage(OptimizerConfig(lr=1e-2), total_steps=10, keep_ref_policy=True)
    scorer.begin_stage("prime")
    learn()
    scored = scorer.log_probs(sequences)
    start, current = policy.log_probs(sequences, 1.0, ref_policy=True), policy.log_probs(sequences, 1.0)
    coordinator.run(client.update_from_disk(tiny_model("qwen3"), "another"))
    with pytest.raises(ServerError, match=r"ref-0 \(.*\) scored under weight version another, not ref-prime"):
        scorer.log_probs(sequences)
    scorer.close()
    coordinator.close()
    leave_world()
    assert largest_gap(scored, start) < 1e-4
    assert largest_gap(current, start) > 1e-2


def largest_gap(found, expected):
    pairs = zip(found, expected, strict=True)
    return max(abs(a - b) for row, other in pairs for a, b in zip(row, other, strict=True))


@pytest.mark.slow
def test_killed_in_mid_stage_a_run_has_the_divergences_of_an_uninterrupted_one_with_the_weights_on_the_host(
    tiny_model, qwen3_server, ref_server, tmp_path
):
    model, problems = tiny_model("qwen3"), write_problems(tmp_path / "problems.jsonl")
    config = three_stages(tmp_path / "server", model, problems)
    paths = RunDirectory(config.directory)
    servers = {"policy": qwen3_server, "ref": ref_server}
    kill_when(start_ranks(config, servers), Journal(paths.journal).path("two", 2).is_file)
    place = read_extra(checkpoints(paths.checkpoints)[-1])
    assert place["stage"] == 1 and 0 < place["step"] < 3
    finish(start_ranks(config, servers, resume=True))
    asyncio.run(with_initial_weights(qwen3_server, model))

    # The same traces: what the killed run sampled.
    on_host = three_stages(tmp_path / "host", model, problems, "host")
    host = RunDirectory(on_host.directory)
    host.claim(on_host, resume=False).release()
    shutil.copytree(paths.journal, host.journal, dirs_exist_ok=True)
    finish(start_ranks(on_host, {"policy": qwen3_server}, resume=True))

    found, expected = divergences(paths), divergences(host)
    first, second, again, *later = expected
    assert max(first, again) < 1e-9 and min(second, *later) > 1e-4 and len(later) == 3
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-9)


async def with_initial_weights(server, model):
    async with server.client() as client:
        await client.update_from_disk(model, "initial")


def divergences(paths: RunDirectory) -> list[float]:
    """Of every step: from the stage's start, or from the teacher that it is."""
    metrics = [json.loads(line)["metrics"] for line in paths.metrics.read_text().splitlines()]
    return [step["kl/teacher"] if "kl/teacher" in step else step["kl/ref"] for step in metrics]
