"""How a rank ends, and what it leaves for the launcher to tell."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import yaml

from exprl_megatron.config.load import check_config
from exprl_megatron.runs.directory import RunDirectory, read_config
from exprl_megatron.serving.registry import Registry
from exprl_megatron.training.worker import _longest_wait

# Forks a rank for each (directory, whether its main thread hangs as in a collective while something beside it fails,
# error), and prints their exit statuses.
RANKS = """
import json, os, sys, threading, time
from pathlib import Path
from torch.distributed.checkpoint.api import CheckpointException
from exprl_megatron.errors import RunStopped, UserError
from exprl_megatron.training import worker

def rank(directory, hangs, error):
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(directory / name, os.O_WRONLY | os.O_CREAT), number)

    def work(paths, servers, on_failure, logs):
        if not hangs:
            raise eval(error)
        print("step 1 done")
        threading.Thread(target=on_failure, args=(eval(error),)).start()
        time.sleep(300)

    worker.work = work
    status = worker.run_rank(directory, directory / "servers")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

statuses = []
for directory, hangs, error in json.loads(sys.argv[1]):
    if (child := os.fork()) == 0:
        rank(Path(directory), hangs, error)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(statuses))
"""
CASES = {
    "known": (True, "RunStopped('Too many abstentions.')"),
    "unknown": (True, "LookupError('no such trace')"),
    "torch": (False, "CheckpointException('load', {})"),
    "disk": (False, "OSError(28, 'No space left on device')"),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """`ended(case)`: directory, exit status, report, output and errors of that rank."""
    root = tmp_path_factory.mktemp("ranks")
    for case in CASES:
        (root / case / "logs").mkdir(parents=True)
        (root / case / "servers.json").write_text("[]")
    cases = json.dumps([(str(root / case), *how) for case, how in CASES.items()])
    command = [sys.executable, "-c", RANKS, cases]
    done = subprocess.run(command, env={"RANK": "0"}, capture_output=True, text=True, timeout=300, check=True)
    statuses = dict(zip(CASES, json.loads(done.stdout), strict=True))

    def of(case):
        told = json.loads((root / case / "logs" / "trainer-0.end").read_text())
        return root / case, statuses[case], told, *((root / case / name).read_text() for name in ("out", "err"))

    return of


def test_what_fails_beside_a_hanging_main_thread_ends_the_rank_with_its_sentence(ended):
    _, status, told, output, _ = ended("known")
    assert status == told["status"] == 1
    assert told["message"] == "Too many abstentions."
    assert output == "step 1 done\n"


def test_an_unexpected_failure_beside_the_main_thread_leaves_its_traceback_in_the_log(ended):
    _, _, told, _, errors = ended("unknown")
    assert told == {"status": 1, "message": "trainer 0 failed: LookupError: no such trace", "unexpected": True}
    assert "LookupError: no such trace" in errors


def test_a_failure_of_torch_that_is_not_an_exception_is_reported_too(ended):
    _, status, told, _, _ = ended("torch")
    assert status == 1
    assert told["message"].startswith("trainer 0 failed: CheckpointException") and told["unexpected"]


def test_a_disk_that_is_full_is_one_sentence(ended):
    directory, status, told, _, errors = ended("disk")
    assert status == told["status"] == 2
    assert told["message"].startswith(f"Cannot use {directory} (No space left on device); make room there")
    assert "Traceback" not in errors


def _run_directory(tmp_path, **changes):
    """The directory of a run with one problem set, as its launcher leaves it."""
    paths = RunDirectory(tmp_path / "run")
    stage = {"kind": "sparse-rl", "name": "a", "steps": 1, "problems": {"source": "mine:load"}} | changes
    tree = {"directory": str(paths.root), "policy": {"model": "m"}, "stages": [stage]}
    paths.logs.mkdir(parents=True)
    paths.config.write_text(yaml.safe_dump(check_config(tree, "test").model_dump(mode="json")))
    return paths


def test_a_rank_that_lacks_a_module_of_the_user_ends_with_its_sentence_and_waits_for_no_other_rank(tmp_path):
    paths = _run_directory(tmp_path, loss={"surrogate": "only_on_rank_0:loss"})
    command = [
        sys.executable,
        "-m",
        "exprl_megatron.training.worker",
        str(paths.root),
        "--servers",
        str(paths.registry),
    ]
    environment = os.environ | {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    report = json.loads((paths.logs / "trainer-1.end").read_text())
    assert ended.returncode == report["status"] == 2
    assert report["message"].startswith("stages.0.loss.surrogate: The plugin only_on_rank_0:loss cannot be imported: ")
    assert f"there is no module only_on_rank_0 in the working directory ({tmp_path})" in report["message"]


def test_a_rank_expects_the_problems_that_the_launcher_read(tmp_path):
    paths = _run_directory(tmp_path)
    config = read_config(paths)
    assert paths.recorded_problems(config) == {}
    paths.inputs.write_text(json.dumps({"stages.0.problems": "0" * 32, "policy.model": "x"}))
    assert paths.recorded_problems(config) == {config.stages[0].problems: "0" * 32}


# With 8 x 4 traces, and 256 judgements of 300 s at a time: 2, 4, 2 and 128 rounds.
@pytest.mark.parametrize(
    ("segments", "judging_s"),
    [
        ({}, 2 * 300),
        ({"max_segments": None}, 4 * 300),
        ({"max_segments": 10, "min_tokens": 0}, 2 * 300),
        ({"max_segments": None, "min_tokens": 0}, 128 * 300),
    ],
    ids=["default", "no cap", "no minimum", "neither"],
)
def test_ranks_wait_for_as_many_judgements_as_a_step_can_have(segments, judging_s):
    found, without = _waits(segments, 1024)
    assert found - without == pytest.approx(judging_s)


@pytest.mark.parametrize(
    ("segments", "changes"), [({"max_segments": None, "min_tokens": 0}, {}), ({}, {"reproduce": "released"})]
)
def test_ranks_wait_for_a_day_of_judging_at_most(segments, changes):
    found, without = _waits(segments, 16384, **changes)
    assert found - without == 24 * 3600


def _waits(segments, tokens, **changes):
    """The longest wait of a process stage, and that without the time of its judgements."""
    tree = {
        "directory": "d",
        "policy": {"model": "m", "max_tokens": tokens + 512},
        "judge": {"model": "j", "concurrency": 256, "deadline_s": 300},
        "stages": [
            {"kind": "exprl-process", "name": "a", "steps": 3, "problems": {"source": "x"}, "segments": segments}
            | {"problems_per_step": 8, "group_size": 4, "sampling": {"max_new_tokens": tokens}}
        ],
    }
    config = check_config(tree | changes, "test")
    server, judge = config.server, config.judge
    others = [server.start_deadline_s, server.request_deadline_s, config.sync.deadline_s, judge.server.start_deadline_s]
    return _longest_wait(config), sum(others) + judge.rubric.deadline_s + 60


def test_a_rank_leaves_what_it_starts_with_out_of_collections_before_it_learns(tmp_path, monkeypatch):
    """Twice: of the libraries before anything is built, and of what the run is made of."""
    from exprl_megatron.plugins import loading
    from exprl_megatron.policy import world
    from exprl_megatron.runs import directory
    from exprl_megatron.training import assemble, loop, worker

    events = []

    def noting(event, result=None):
        return lambda *_, **__: events.append(event) or result

    run = SimpleNamespace(close=noting("close"), close_logs=noting("close logs"))
    policy = SimpleNamespace(layout=None)
    config = SimpleNamespace(plugin_path=("own",), policy=policy, seed=0, stages=(), evaluation=None)
    for module, name, event, result in (
        (worker, "keep_freed_memory", "keep memory", None),
        (worker, "collect_between_steps", "freeze", None),
        (worker, "collect", "collect", None),
        (worker, "read_key", "key", None),
        (worker, "_longest_wait", "wait", 1.0),
        (worker, "uses_cuda", "cuda?", False),
        (directory, "read_config", "config", config),
        (world, "enter_world", "enter", None),
        (world, "leave_world", "leave", None),
        (assemble, "assemble", "assemble", run),
        (loop, "run_stages", "learn", None),
    ):
        monkeypatch.setattr(module, name, noting(event, result))
    monkeypatch.setattr(loading, "use_plugin_path", lambda path: events.append(f"search {path[0]}"))
    monkeypatch.setattr(worker.gc, "disable", noting("no collections"))
    with ExitStack() as logs:
        worker.work(tmp_path, Registry(tmp_path / "servers"), lambda error: None, logs)
    kept = ["no collections", "search own", "keep memory", "freeze", "enter", "assemble", "collect", "freeze", "learn"]
    assert [event for event in events if event in kept] == kept
    assert events[-3:] == ["close", "leave", "close logs"]
