"""The scripts of a job, run by bash beside stand-ins for `exprl` and Slurm's commands."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from exprl_megatron.errors import UserError
from recipes import scripts
from recipes.places import Component, Fewer, Site
from recipes.scripts import Place

TRAINER = Component("trainer", 1, 0)


@pytest.fixture
def machine(tmp_path):
    """A working directory with blanks in its name, whose `exprl` writes down how it was called and what it saw."""
    work = tmp_path / "my work"
    binaries = work / ".venv" / "bin"
    binaries.mkdir(parents=True)
    shipped = tmp_path / "job" / "code"
    shipped.mkdir(parents=True)
    (shipped / "resolved.yaml").write_text("new")
    _command(binaries / "exprl", 'echo "$* [${GREETING:-}] ${CUDA_VISIBLE_DEVICES:-all}" >>"$CALLS"; exit ${STATUS:-0}')
    return work


def _command(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def play(script: str, work: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run a component's script on node 0; `calls` beside the working directory holds what `exprl` was asked."""
    # NeMo-Run mounts the job's directory there, or writes its real path in the script.
    script = script.replace("/nemo_run", str(work.parent / "job"))
    inherited = os.environ | {"SLURM_NODEID": "0", "CALLS": str(work.parent / "calls")} | environment
    return subprocess.run(["bash", "-c", script], env=inherited, capture_output=True, text=True, timeout=300)


def calls(work: Path) -> str:
    return (work.parent / "calls").read_text()


def place(work: Path, **changes) -> Place:
    return Place("runs/a run", Site(workdir=str(work), **changes))


def test_the_trainer_s_script_puts_the_config_into_the_run_s_directory_and_runs_it(machine):
    ended = play(scripts.trainer(place(machine), TRAINER, resume=False), machine, STATUS="75")
    assert ended.returncode == 75, ended.stderr
    assert calls(machine) == "train runs/a run/resolved.yaml --servers registered [] all\n"
    assert (machine / "runs" / "a run" / "resolved.yaml").read_text() == "new"


@pytest.mark.parametrize(
    ("asked", "restarts", "resumes"), [(False, "0", False), (False, "1", True), (True, "0", True), (True, "1", True)]
)
def test_a_run_that_has_started_is_resumed_where_that_was_asked_for_or_slurm_has_restarted_the_job(
    machine, asked, restarts, resumes
):
    run = machine / "runs" / "a run"
    run.mkdir(parents=True)
    script = scripts.trainer(place(machine), TRAINER, resume=asked)
    play(script, machine, SLURM_RESTART_COUNT=restarts)
    assert "--resume" not in calls(machine), "nothing has started yet"
    (run / "config.yaml").touch()
    (run / "resolved.yaml").write_text("old")
    play(script, machine, SLURM_RESTART_COUNT=restarts)
    assert ("--resume" in calls(machine)) == resumes
    assert (run / "resolved.yaml").read_text() == ("new" if resumes else "old")


def test_the_nodes_of_a_trainer_tell_each_other_from_slurm_s_variables(machine):
    script = scripts.trainer(place(machine), Component("trainer", 3, 0, devices=(4, 5)), resume=False)
    ended = play(script, machine, SLURM_NODEID="2", MASTER_ADDR="n7", MASTER_PORT="32001")
    assert ended.returncode == 0, ended.stderr
    assert "--nodes 3 --node-rank 2 --master n7:32001" in calls(machine)
    assert calls(machine).endswith("4,5\n")


@pytest.mark.parametrize(
    ("given", "rank", "asked"),
    [
        ("8", "7", "resolved.yaml --servers registered --nodes 8 --node-rank 7 "),
        ("7", "5", "resolved.yaml policy.layout.dp=3 --servers registered --nodes 6 --node-rank 5 "),
        ("7", "6", None),
        ("2", "1", "resolved.yaml policy.layout.dp=1 --servers registered --nodes 2 --node-rank 1 "),
    ],
)
def test_on_fewer_nodes_the_trainer_has_fewer_replicas_and_what_fills_none_is_left_alone(machine, given, rank, asked):
    component = Component("trainer", 8, 0, fewer=(Fewer(6, 3), Fewer(4, 2), Fewer(2, 1)))
    script = scripts.trainer(place(machine), component, resume=False)
    told = {"SLURM_STEP_NUM_NODES": given, "SLURM_NODEID": rank, "MASTER_ADDR": "n7", "MASTER_PORT": "32001"}
    ended = play(script, machine, **told)
    assert ended.returncode == 0, ended.stderr
    if asked is None:
        assert not (machine.parent / "calls").exists()
    else:
        assert asked in calls(machine)


def test_variables_arrive_as_they_were_written_and_a_missing_secret_is_named(machine):
    site = {"variables": {"GREETING": "two 'words' and a $sign"}, "environment": ["TOKEN"]}
    script = scripts.trainer(place(machine, **site), TRAINER, resume=False)
    assert play(script, machine, TOKEN="secret").returncode == 0
    assert "[two 'words' and a $sign]" in calls(machine)
    missing = play(script, machine)
    assert missing.returncode != 0 and "TOKEN: is not set where the job runs" in missing.stderr


def test_servers_that_end_with_the_run_leave_the_verdict_to_the_trainer(machine):
    script = scripts.servers(place(machine), Component("policy", 2, 1))
    failed = play(script, machine, STATUS="3")
    assert failed.returncode == 3, "a failure of theirs is the job's"
    sooner = play(script.replace("sleep 600", "sleep 0.1"), machine)
    assert sooner.returncode == 1 and "policy: the run has ended, but its trainer has not" in sooner.stderr
    assert "--kind policy --nodes 2 --node-rank 0" in calls(machine)


@pytest.mark.parametrize(
    ("site", "said"),
    [
        ({"workdir": "/data/nemo_run_cache"}, "site.workdir is /data/nemo_run_cache, but NeMo-Run replaces"),
        ({"variables": {"A": "/nemo_run"}}, "site.variables\\['A'\\] is /nemo_run"),
        ({"variables": {"A-B": "c"}}, "'A-B' is not a name of a variable"),
        ({"environment": ["A B"]}, "'A B' is not a name of a variable"),
    ],
)
def test_what_a_script_would_not_say_is_refused(site, said):
    with pytest.raises(UserError, match=said):
        Place("runs/x", Site(**site)).check()
    with pytest.raises(UserError, match="directory is /nemo_run/x"):
        Place("/nemo_run/x", Site()).check()


@pytest.fixture
def batch(tmp_path):
    """`batch(trainer, restarts)`: the batch script's part, with a trainer of that text; what scontrol was asked."""
    _command(tmp_path / "scontrol", f'echo "$*" >>{tmp_path}/asked; [ "$1" = show ] && echo n3 && echo n4')

    def start(trainer: str, restarts: int = 0) -> subprocess.Popen:
        environment = {"SLURM_JOB_ID": "4711", "SLURM_RESTART_COUNT": str(restarts), "SLURM_JOB_NODELIST": "n[3-4]"}
        text = f"{scripts.around(restarts=2)}\n{trainer} & pids[0]=$!\n"
        text += 'while kill -0 "${pids[0]}" 2>/dev/null; do sleep 0.1; done; wait "${pids[0]}"; exit $?'
        path = f"{tmp_path}:{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", "-c", text], env=os.environ | environment | {"PATH": path}, stdout=subprocess.PIPE, text=True
        )

    def run(trainer: str, restarts: int = 0) -> tuple[int, str]:
        process = start(trainer, restarts)
        process.communicate(timeout=300)
        return process.returncode, (tmp_path / "asked").read_text()

    return start, run


@pytest.mark.parametrize(
    ("status", "restarts", "queued"), [(75, 0, True), (75, 1, True), (75, 2, False), (1, 0, False)]
)
def test_a_job_is_queued_again_when_the_trainer_could_continue_but_not_forever(batch, status, restarts, queued):
    _, run = batch
    ended, asked = run(f"(exit {status})", restarts)
    assert ended == status
    assert ("requeue 4711" in asked) == queued


def test_slurm_s_signal_reaches_the_trainer_and_its_nodes_are_found_by_slurm(batch, tmp_path):
    start, _ = batch
    told = tmp_path / "told"
    trainer = f"bash -c 'trap \"exit 75\" USR1; echo $MASTER_ADDR $MASTER_PORT >{told}; while :; do sleep 0.1; done'"
    process = start(trainer)
    deadline = time.monotonic() + 300
    while not (told.is_file() and told.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=300)
    assert process.returncode == 75
    assert told.read_text() == f"n3 {32000 + 4711 % 768}\n"
    assert "requeue 4711" in (tmp_path / "asked").read_text()
