"""Experiments through NeMo-Run on this machine, with a stand-in for `exprl`, and what is refused before they start."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import nemo_run as run
import pytest
import yaml
from typer.testing import CliRunner

from exprl_megatron.config.load import load_config
from exprl_megatron.errors import UserError
from exprl_megatron.processes.fork_server import ForkRequest, ForkServer
from recipes import executors, llama3p3_70b, miniature, qwen3_4b
from recipes.__main__ import app
from recipes.executors import check_executor
from recipes.experiment import launch, submit
from recipes.places import Nodes, components
from recipes.trees import as_run_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def site(tmp_path):
    """A working directory with an `exprl` that notes what it runs and fails for the runs that $FAIL names."""
    binaries = tmp_path / "work" / ".venv" / "bin"
    binaries.mkdir(parents=True)
    exprl = binaries / "exprl"
    exprl.write_text('#!/bin/bash\necho "$*" >>calls\ncase "$2" in $FAIL/*) echo "no luck" >&2; exit 7;; esac\n')
    exprl.chmod(0o755)
    return tmp_path / "work"


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """`recipes(site, arguments...)`: `python -m recipes`, forked from a process that has imported NeMo-Run."""
    home = tmp_path_factory.mktemp("home")
    inherited = os.environ | {"NEMORUN_HOME": str(home), "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{ROOT}"}
    server = ForkServer("recipes.__main__", {"recipes_in"}, inherited, 300)

    def run(site: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "recipes_in", str(site), *arguments]
        output, errors = home / "output", home / "errors"
        with open(output, "w") as out, open(errors, "w") as err:
            request = ForkRequest(command, inherited | environment, grace_s=None, name="recipes")
            child = server.start(request, [out.fileno(), err.fileno()])
        status = child.wait(300)
        return subprocess.CompletedProcess(command, status, output.read_text(), errors.read_text())

    yield run
    server.close()


def slurm_of_research(**changes) -> run.Config:
    executor = executors.slurm()
    for name, value in ({"account": "research"} | changes).items():
        setattr(executor, name, value)
    return executor


TWO_STAGES = ("exprl_then_sparse_rl", "--factory", "miniature", "--yes", "--name", "mine")


@pytest.mark.slow
def test_both_stages_run_from_the_config_that_is_in_their_directory(site, recipes):
    ended = recipes(site, *TWO_STAGES, "prime.stages[0].steps=3", "sparse.policy.layout.tp=1", FAIL="none")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    runs = [f"runs/miniature/{stage}" for stage in ("prime", "sparse")]
    assert (site / "calls").read_text() == "".join(f"train {directory}/resolved.yaml\n" for directory in runs)
    prime, sparse = (load_config(site / directory / "resolved.yaml") for directory in runs)
    assert prime.stages[0].steps == 3 and prime.directory == runs[0]
    assert sparse.policy.layout.tp == 1 and sparse.judge is None
    assert sparse.policy.model == f"{runs[0]}/models/prime", "it starts from what the first stage leaves"

    # the same again finds the runs; asked to resume, it continues
    for directory in runs:
        (site / directory / "config.yaml").touch()
    again = recipes(site, *TWO_STAGES, FAIL="none")
    assert again.returncode == 2 and "runs/miniature/prime already holds a run" in again.stdout + again.stderr
    assert recipes(site, *TWO_STAGES, "resume=True", FAIL="none").returncode == 0
    assert (site / "calls").read_text().endswith("train runs/miniature/sparse/resolved.yaml --resume\n")


@pytest.mark.slow
def test_a_first_stage_that_fails_keeps_the_second_from_starting_and_all_are_notified(site, recipes):
    ended = recipes(site, *TWO_STAGES, FAIL="runs/miniature/prime")
    assert ended.returncode == 1
    assert "did not succeed (prime: FAILED, sparse: CANCELLED)" in " ".join((ended.stdout + ended.stderr).split())
    assert (site / "calls").read_text() == "train runs/miniature/prime/resolved.yaml\n"

    told = recipes(site, "logs", "mine")
    assert "no luck" in told.stdout and "not started: prime has failed" in told.stdout, told.stdout + told.stderr
    assert told.returncode == 0
    nobody = recipes(site, "logs", "yours")
    assert nobody.returncode == 2 and "recipes: There is no experiment yours" in nobody.stderr


@pytest.mark.slow
def test_a_job_that_slurm_does_not_tell_of_is_not_reported_as_well(site, recipes):
    binaries = site / ".venv" / "bin"
    for name, body in (("sbatch", "echo 4711"), ("sacct", "exit 1")):
        (binaries / name).write_text(f"#!/bin/bash\n{body}\n")
        (binaries / name).chmod(0o755)
    path = {"PATH": f"{binaries}:{os.environ['PATH']}"}
    slurm = ("run.executor=slurm", "run.executor.account=research")
    submitted = recipes(site, "exprl", "--factory", "miniature", "--yes", "--name", "mine", "--detach", *slurm, **path)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    told = recipes(site, "status", "mine", **path)
    assert told.returncode == 2 and "NeMo-Run has no word of prime; ask `sacct`" in told.stderr, told.stdout


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"account": ""}, "run.executor.account is empty"),
        ({"env_vars": {"A": "b c"}}, "env_vars sets A; use site.variables"),
        ({"container_mounts": ["/data:/nemo_run_data"]}, "container_mounts is /data:/nemo_run_data, but NeMo-Run"),
        ({"tunnel": run.Config(run.LocalTunnel, job_dir="/jobs")}, "job_dir is /jobs, but NeMo-Run copies nothing"),
        ({"tunnel": run.Config(run.SSHTunnel, host="h", user="", job_dir="/j")}, "tunnel.user is empty"),
        ({"tunnel": run.Config(run.SSHTunnel, host="h", user="u", job_dir="/my jobs")}, "without blanks"),
    ],
)
def test_an_executor_that_nemo_run_would_misread_is_refused_in_a_sentence(changes, said):
    executor = slurm_of_research(**changes)
    with pytest.raises(UserError, match=said):
        launch(miniature.exprl(), executor, dryrun=True)


@pytest.mark.parametrize("name", ["../../elsewhere", "a b", "a/b", "..", "$(id)", "-x", ""])
def test_an_experiment_s_name_that_is_no_plain_word_is_refused(name):
    ctx = run.cli.RunContext(name=name, dryrun=True)
    with pytest.raises(UserError, match=r"^--name is .*, which is to be a directory's name; use letters"):
        submit(ctx, [], None, resume=False)


def test_other_executors_and_directories_of_jobs_are_refused(monkeypatch):
    with pytest.raises(UserError, match="choose local, slurm or slurm_over_ssh"):
        check_executor(run.DockerExecutor(container_image="x"))
    executor = run.SlurmExecutor(account="research")
    monkeypatch.setattr(executors, "get_nemorun_home", lambda: "/scratch/nemo_run")
    with pytest.raises(UserError, match="NEMORUN_HOME is /scratch/nemo_run, but NeMo-Run replaces"):
        check_executor(executor)


def test_a_job_over_ssh_needs_to_know_where_it_works_and_a_secret_must_be_here(monkeypatch):
    executor = executors.slurm_over_ssh()
    executor.account, executor.tunnel.host, executor.tunnel.user, executor.tunnel.job_dir = "a", "h", "u", "/j"
    with pytest.raises(UserError, match=r"site\.workdir is empty"):
        launch(miniature.exprl(), executor, dryrun=True)
    monkeypatch.delenv("SOME_TOKEN", raising=False)
    recipe = miniature.exprl()
    recipe.site.environment = ["SOME_TOKEN"]
    with pytest.raises(UserError, match=r"SOME_TOKEN of site\.environment is not set here"):
        launch(recipe, dryrun=True)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("tpp", 2, "unknown key policy.layout.tpp; did you mean 'tp'"),
        ("tp", "two", "policy.layout.tp is 'two'"),
    ],
)
def test_a_typo_in_a_recipe_is_refused_by_name(key, value, said):
    recipe = miniature.exprl()
    setattr(recipe.config.policy.layout, key, value)
    with pytest.raises(UserError, match=said):
        launch(recipe, dryrun=True)


def test_a_layout_that_the_model_does_not_allow_is_refused_before_a_job_is_queued():
    recipe = miniature.exprl_then_sparse_rl()
    recipe.site.workdir = str(ROOT)
    recipe.sparse.policy.layout.tp = 3
    with pytest.raises(UserError, match=r"^sparse: policy\.layout\.tp is 3, which does not divide the model's 4"):
        launch(recipe, dryrun=True)


def test_a_dry_run_on_this_machine_refuses_too_few_gpus_and_a_port_in_use(monkeypatch, capsys):
    """As `exprl train --dry-run` does; a Slurm job's machine is another one."""
    recipe = miniature.exprl()
    recipe.site.workdir = str(ROOT)
    recipe.config.directory = "runs/never"
    # What packs files asks for it.
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115 - closed with the test's process
    with monkeypatch.context() as patched:
        patched.setattr("exprl_megatron.launch.launcher.gpu_count", lambda: 1)
        recipe.config.server.count = 2
        with pytest.raises(UserError, match=r"of 1; reduce policy\.layout or the servers' count or tp"):
            launch(recipe, dryrun=True)
        launch(recipe, slurm_of_research(), dryrun=True)
        assert "sbatch" in capsys.readouterr().out
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        recipe.config.server.port = port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"Port {port}, configured for policy-0, is in use"):
            launch(recipe, dryrun=True)
    assert not (ROOT / "runs/never").exists()


def test_words_of_the_command_line_are_taken_as_yaml_takes_them():
    tree = miniature.exprl().config
    tree.sync.verify, tree.evaluation = "false", "null"
    config = as_run_config(tree, "test")
    assert config.sync.verify is False and config.evaluation is None
    whole = as_run_config(miniature.exprl().config, "test")
    assert as_run_config(yaml.safe_load(yaml.safe_dump(whole.model_dump(mode="json"))), "test") == whole


def test_processes_that_do_not_fit_on_their_nodes_are_all_named_at_once():
    config = as_run_config(llama3p3_70b.exprl(nodes=8).config, "test")
    with pytest.raises(UserError) as refused:
        components(config, Nodes(trainer=3, policy=1, judge=1))
    told = str(refused.value).splitlines()
    assert [line.split(",")[0] for line in told] == [
        "nodes.trainer is 3",
        "trainer needs 14 GPUs of each of its 3 nodes",
        "policy needs 16 GPUs of each of its 1 nodes",
    ]


def test_a_trainer_may_do_with_fewer_nodes_that_whole_replicas_fill():
    config = as_run_config(llama3p3_70b.exprl(nodes=32).config, "test")
    trainer = components(config, Nodes(trainer=20, policy=8, judge=4, trainer_least=10))[0]
    # A replica is TP4 x PP5, two and a half nodes.
    assert [(fewer.nodes, fewer.dp) for fewer in trainer.fewer] == [(15, 6), (10, 4)]


def test_fewer_nodes_that_no_replicas_fill_or_that_servers_share_are_refused():
    config = as_run_config(llama3p3_70b.exprl(nodes=32).config, "test")
    with pytest.raises(UserError, match=r"trainer_least is 11, .* the fewest nodes from there on are 15"):
        components(config, Nodes(trainer=20, policy=8, judge=4, trainer_least=11))
    config = as_run_config(miniature.exprl().config, "test")
    with pytest.raises(UserError, match="trainer_least is 1, but policy and judge servers are on the trainer's nodes"):
        components(config, Nodes(trainer=1, gpus=0, trainer_least=1))


def test_sampling_servers_that_take_turns_with_the_trainer_are_on_its_gpus():
    recipe = qwen3_4b.exprl(nodes=1)
    config = as_run_config(recipe.config, "test")
    devices = {part.kind: part.devices for part in components(config, Nodes(trainer=1))}
    assert devices == {"trainer": (0, 1, 2, 3, 4, 5), "policy": (0, 1, 2, 3, 4, 5), "judge": (6, 7)}
    with pytest.raises(UserError, match=r"nodes\.policy is 1, but placement\.kind is colocated"):
        components(config, Nodes(trainer=1, policy=1))
    recipe.config.placement.kind = "separate"
    with pytest.raises(UserError, match="judge needs 14 GPUs of each of its 1 nodes, which have 8"):
        components(as_run_config(recipe.config, "test"), Nodes(trainer=1))


def test_a_recipe_s_whole_config_is_printed_for_the_planner_and_an_unknown_one_refused():
    printed = CliRunner().invoke(app, ["resolve", "llama3p3_70b", "sparse_rl", "--nodes", "16"])
    config = as_run_config(yaml.safe_load(printed.stdout), "printed")
    assert config == as_run_config(llama3p3_70b.sparse_rl(nodes=16).config, "test")
    for asked in (["resolve", "llama"], ["resolve", "llama3p3_70b", "rl"]):
        refused = CliRunner().invoke(app, asked)
        assert isinstance(refused.exception, UserError) and "There is no recipe" in str(refused.exception)


def test_a_number_of_nodes_without_a_layout_is_refused():
    with pytest.raises(UserError, match="llama3p3_70b has layouts for 8, 16, 32 nodes, not for 12"):
        llama3p3_70b.exprl(nodes=12)
