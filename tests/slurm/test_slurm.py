"""The miniature's recipes on a real Slurm: a job of several components, its failures, its interruptions."""

import filecmp
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from jobs import (
    ROOT,
    cluster,
    held,
    idle_nodes,
    let_go,
    records,
    server,
    set_time_limit,
    started,
    state,
    steps_done,
    submit,
    trainers,
    wait_for_end,
    wait_for_steps,
    wait_until,
    without_node,
)

from exprl_megatron.errors import RunStopped
from exprl_megatron.runs.directory import RunDirectory, read_config
from exprl_megatron.serving.registry import RegisteredServer, Registry
from recipes import miniature
from recipes.experiment import launch

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

STEPS = 100


class Ran(NamedTuple):
    """The experiment of two stages, when it has ended."""

    root: Path
    prime: str
    """The leader of its job, which is the trainer's component."""
    sparse: str
    killed: RegisteredServer
    anew: RegisteredServer


def tiny(config, directory: Path):
    """Make the run of a recipe a matter of seconds, in `directory`."""
    config.directory = str(directory)
    config.evaluation = None
    config.policy.layout.tp = 1
    for stage in config.stages:
        stage.steps = 2
        if hasattr(stage, "group_size"):
            stage.problems_per_step, stage.group_size, stage.sampling.max_new_tokens = 2, 2, 16


def two_stages(root: Path):
    """The two-stage experiment, without the judge's gate and with a longer second stage."""
    recipe = miniature.exprl_then_sparse_rl()
    recipe.site.workdir = str(ROOT)
    tiny(recipe.prime, root / "prime")
    tiny(recipe.sparse, root / "sparse")
    recipe.prime.judge.gate = None
    recipe.prime.server.count = recipe.sparse.server.count = 1
    recipe.sparse.stages[0].steps = 5
    return recipe


def fine_tuning(directory: Path):
    """A run that needs no servers: STEPS short steps, a checkpoint after every 20."""
    recipe = miniature.sft()
    recipe.site.workdir = str(ROOT)
    tiny(recipe.config, directory)
    recipe.config.judge = None
    recipe.config.stages[0].steps, recipe.config.stages[0].batch_size = STEPS, 4
    recipe.config.checkpoint.every_steps = 20
    return recipe


def from_another_process(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "recipes", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def experiment(slurm, tmp_path_factory):
    """Both stages to their end, detached; the second stage's sampling server is killed during it."""
    root = tmp_path_factory.mktemp("stages")
    prime, sparse = submit(two_stages(root), cluster())
    wait_for_steps(root / "sparse", 1, sparse)
    registry = Registry(root / "sparse" / "servers")
    killed = registry.find("policy-0")
    ranks = held(root / "sparse")
    server(root / "prime" / "models" / "prime").kill()
    let_go(ranks)
    wait_until(lambda: registry.find("policy-0") not in (None, killed), "a new policy-0")
    anew = registry.find("policy-0")
    wait_for_end(sparse, "COMPLETED")
    return Ran(root, prime, sparse, killed, anew)


def test_the_two_stages_run_as_heterogeneous_jobs_with_servers_and_trainer_on_nodes_of_their_own(experiment):
    for leader in (experiment.prime, experiment.sparse):
        components = {job["HetJobOffset"]: job for job in records().values() if job.get("HetJobId") == leader}
        trainer, servers = (components[offset]["NodeList"] for offset in ("0", "1"))
        assert {trainer, servers} == {"node0", "node1"}
    assert experiment.killed.url.startswith(f"http://{servers}:")
    assert state(experiment.prime) == "COMPLETED"
    assert steps_done(experiment.root / "prime") == 2
    for stage in ("prime", "sparse"):
        assert (experiment.root / stage / "models" / stage / "model.safetensors").is_file()


def test_a_dead_sampling_server_is_restarted_and_the_run_continues(experiment):
    assert experiment.anew.instance_id != experiment.killed.instance_id
    assert steps_done(experiment.root / "sparse") == 5


def test_status_and_logs_of_every_component_are_shown_to_another_process(experiment):
    status = from_another_process("status", "exprl_then_sparse_rl")
    assert status.stdout.splitlines()[-2:] == ["prime: SUCCEEDED", "sparse: SUCCEEDED"], status.stderr
    assert status.returncode == 0
    logs = from_another_process("logs", "exprl_then_sparse_rl").stdout
    assert "#### prime: 0 trainer, 1 policy, 2 judge" in logs
    assert "#### sparse: 0 trainer, 1 policy" in logs
    for file in ("judge-0.log", "policy-0.log", "trainer-0.log"):
        assert file in logs


def test_a_stage_that_fails_cancels_the_next_one(slurm, tmp_path):
    recipe = two_stages(tmp_path)
    recipe.prime.policy.model = str(tmp_path / "nowhere")
    with pytest.raises(RunStopped, match="prime: FAILED, sparse: CANCELLED"):
        launch(recipe, cluster())
    assert not (tmp_path / "sparse").exists()
    status = from_another_process("status", "exprl_then_sparse_rl")
    assert status.returncode == 1
    assert status.stdout.splitlines()[-2:] == ["prime: FAILED", "sparse: CANCELLED"]


def test_a_time_limit_and_scancel_cost_no_weights_and_container_flags_reach_the_job(slurm, tmp_path):
    interrupted = tmp_path / "interrupted"
    (job,) = submit(fine_tuning(interrupted), cluster())
    wait_for_steps(interrupted, 1, job)
    ranks = held(interrupted)
    # Slurm looks at time limits twice a minute, and sends the signal when fewer than 20 minutes are left.
    set_time_limit(job, int(time.time() - started(job)) // 60 + 5)
    wait_until((interrupted / "stop").is_file, "Slurm's signal")
    # The limit holds for the restart too.
    set_time_limit(job, 60)
    let_go(ranks)
    wait_until(lambda: records()[job]["Restarts"] == "1", "the requeue")
    done = steps_done(interrupted)
    assert done < STEPS
    wait_for_steps(interrupted, done + 1, job)
    subprocess.run(["scancel", job], check=True)
    wait_for_end(job, "CANCELLED")
    assert steps_done(interrupted) < STEPS

    resumed = fine_tuning(interrupted)
    resumed.resume = True
    (job,) = submit(resumed, cluster())
    wait_for_end(job, "COMPLETED")

    inside = tmp_path / "inside"
    contained = fine_tuning(inside / "run")
    mounts = [f"{tmp_path / 'outside'}:{inside}"]
    (tmp_path / "outside").mkdir()
    (job,) = submit(contained, cluster(container_image="registry/exprl:1", container_mounts=mounts))
    (rank,) = wait_until(lambda: trainers(inside / "run"), "the trainer")
    # Rank, supervisor, launcher: a forked process shows another's environment.
    assert rank.parent().parent().environ()["STANDIN_CONTAINER_IMAGE"] == "registry/exprl:1"
    wait_for_end(job, "COMPLETED")
    uninterrupted = tmp_path / "outside" / "run"
    assert not list(inside.iterdir())

    name = f"models/{resumed.config.stages[0].name}/model.safetensors"
    assert filecmp.cmp(interrupted / name, uninterrupted / name, shallow=False)


def test_after_a_node_is_lost_the_trainer_continues_with_those_that_are_left(slurm, tmp_path):
    recipe = fine_tuning(tmp_path / "run")
    recipe.nodes.trainer, recipe.nodes.trainer_least = 2, 1
    recipe.config.policy.layout.dp = 2
    wait_until(lambda: idle_nodes() == 2, "the end of earlier jobs")
    (job,) = submit(recipe, cluster())
    wait_for_steps(tmp_path / "run", 21, job)
    assert len(trainers(tmp_path / "run")) == 2
    ranks = held(tmp_path / "run")
    with without_node("node1"):
        let_go(ranks)
        wait_until(lambda: records()[job]["Restarts"] == "1", "the requeue")
        (left,) = wait_until(lambda: set(trainers(tmp_path / "run")) - set(ranks), "the trainer on one node")
        assert left.is_running() and read_config(RunDirectory(tmp_path / "run")).policy.layout.world_size == 1
        wait_for_end(job, "COMPLETED")
        assert records()[job]["NodeList"] == "node0"
    assert steps_done(tmp_path / "run") == STEPS
