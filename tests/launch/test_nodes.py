"""A trainer on several nodes: one `exprl train` on each, here side by side on one machine."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from helpers.processes import family, left_behind, wait_until
from helpers.runs import command_words, run_config, write_problems

from exprl_megatron.errors import Preempted, RunStopped, UserError
from exprl_megatron.launch.exit_reports import RankFailed, exit_error, exit_report, parse_exit_report
from exprl_megatron.launch.nodes import HeadNode, Node, WorkerNode
from exprl_megatron.runs.directory import RunDirectory
from exprl_megatron.serving.keys import ensure_key, fingerprint, read_key
from exprl_megatron.serving.registry import RegisteredServer, Registry
from exprl_megatron.utils.keyed_store import connect_store
from exprl_megatron.utils.ports import free_ports

STEPS = 6


@pytest.mark.parametrize("kind", [RankFailed, RunStopped, UserError, Preempted])
def test_a_reported_error_is_raised_as_what_it_was(kind):
    found = exit_error(parse_exit_report(exit_report(kind("it ended")).encode(), "a rank's report"))
    assert (type(found), str(found)) == (kind, "it ended")


def test_each_node_has_as_many_ranks_as_any_other():
    nodes = [Node.from_options(number, 3, "n0:32000") for number in range(3)]
    assert [list(node.ranks(6)) for node in nodes] == [[0, 1], [2, 3], [4, 5]]
    assert list(Node.from_options(None, 1, None).ranks(4)) == [0, 1, 2, 3]
    with pytest.raises(UserError, match="needs 4 trainer processes, which is not a multiple of 3 --nodes"):
        nodes[0].ranks(4)


@pytest.mark.parametrize(
    ("number", "master", "said"),
    [
        (None, "n0:32000", "--node-rank None; give each node its number"),
        (2, "n0:32000", "--node-rank 2; give each node its number"),
        (0, None, "--master None; give node 0's HOST:PORT"),
        (0, "n0", "--master n0; give node 0's HOST:PORT"),
    ],
)
def test_a_node_among_several_knows_its_number_and_where_node_0_is(number, master, said):
    with pytest.raises(UserError, match=said):
        Node.from_options(number, 2, master)


@pytest.fixture
def launchers(tmp_path):
    """Node 0's side and another node's, with the key of their run, and a stranger who can only connect."""
    key_file = tmp_path / "servers" / "key"
    ensure_key(key_file)
    (port,) = free_ports(1)
    host = HeadNode(Node.from_options(0, 2, f"127.0.0.1:{port}"), key_file)
    worker = WorkerNode(Node.from_options(1, 2, f"127.0.0.1:{port}"), key_file)
    return host, worker, connect_store("127.0.0.1", port, 10.0)


def test_launchers_hear_each_other(launchers):
    host, worker, _ = launchers
    assert not worker.has_ended()
    host.raise_reported()
    host.signal_start()
    assert worker.wait_for_start(0.0)
    worker.report(UserError("the disk of node 1 is full"))
    with pytest.raises(UserError, match=r"^the disk of node 1 is full$"):
        host.raise_reported()
    worker.leave()
    host.__exit__()
    assert worker.has_ended()


@pytest.mark.parametrize(
    "words",
    [
        '{"status": 2, "message": "forged by a stranger", "unexpected": false}',
        '{"status": 75, "message": "forged: the batch script would queue the job again", "unexpected": false}',
        "{",
        "",
        b"\xff\x00" * 40,
    ],
)
def test_what_a_stranger_writes_for_a_launcher_is_ignored_and_reported_once(launchers, capfd, words):
    host, worker, stranger = launchers
    host.signal_start()
    assert worker.wait_for_start(0.0)
    # Under the names that others use, which can be listed, and under those without a key.
    worker.report(RunStopped("true"))
    for name in [*stranger.list_keys(), *(f"launchers/{name}" for name in ("begin", "failed", "ended", "killed"))]:
        stranger.set(name, words)
    for _ in range(2):
        host.raise_reported()
        assert not worker.has_ended()
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "failed" in line]
    assert line.startswith("exprl: 'launchers: failed' was written without this run's key in the trainer's store at ")


def test_a_node_that_comes_before_the_key_waits_for_it_and_does_not_believe_in_an_earlier_one(tmp_path):
    (port,) = free_ports(1)
    key_file, stale = tmp_path / "key", tmp_path / "stale"
    ensure_key(stale)
    shared = HeadNode(Node.from_options(0, 2, f"127.0.0.1:{port}"), stale)
    worker = WorkerNode(Node.from_options(1, 2, f"127.0.0.1:{port}"), key_file)
    shared.signal_start()
    assert not worker._has_record("begin")
    ensure_key(key_file)
    assert not worker._has_record("begin")
    key_file.write_text(read_key(stale))
    assert worker._has_record("begin")


@pytest.mark.parametrize("words", [b"", b"{", b"[]", b"null", b'{"status": "2"}', b"\xff", b"[" * 5000])
def test_a_garbled_report_is_one_sentence(words):
    error = exit_error(parse_exit_report(words, "What trainer-3 reported"))
    assert isinstance(error, RunStopped)
    assert str(error).startswith("What trainer-3 reported of its end is garbled (") and "\n" not in str(error)


def train(config, node: int, port: int, *flags: str) -> subprocess.Popen:
    path = Path(config.directory).with_name(f"{Path(config.directory).name}.yaml")
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    where = ["--servers", "registered", "--nodes", "2", "--node-rank", str(node), "--master", f"127.0.0.1:{port}"]
    command = [sys.executable, "-m", "exprl_megatron.cli", "train", str(path), *where, *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def two_nodes(trained_server, tiny_model, tmp_path):
    """`two_nodes(steps, *flags)`: the config of a run at TP2 and its two launchers, node 1 started first."""
    started = []

    def start(steps: int, *flags: str):
        problems = write_problems(tmp_path / "problems.jsonl")
        whole = run_config(tmp_path / "run", tiny_model("qwen3"), tiny_model("qwen3"), problems)
        stage = whole.stages[1].model_copy(update={"steps": steps})
        config = whole.model_copy(update={"stages": (stage,)})
        registry = Registry(RunDirectory(config.directory).registry)
        # As `exprl serve` does, which may come before the trainer's nodes.
        ensure_key(registry.key_file)
        run, log, key = fingerprint(read_key(registry.key_file)), trained_server.log_file, trained_server.key_file
        server = RegisteredServer("policy", "policy-0", trained_server.url, str(log), "first", run, str(key))
        registry.register(server)
        (port,) = free_ports(1)
        second, first = (train(config, node, port, *flags) for node in (1, 0))
        started.extend((first, second))
        return config, first, second

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_two_nodes_stop_when_slurm_asks_them_to_and_continue_to_the_end(two_nodes):
    config, first, second = two_nodes(STEPS)
    directory = RunDirectory(config.directory)
    wait_until(lambda: directory.metrics.is_file() or None not in (first.poll(), second.poll()), 900)
    for process in (second, first):
        process.send_signal(signal.SIGUSR1)
    _, found = first.communicate(timeout=300)
    assert first.returncode == os.EX_TEMPFAIL, found
    _, found = second.communicate(timeout=300)
    assert second.returncode == 0, found
    assert not (directory.models / "sparse").exists()

    _, first, second = two_nodes(STEPS, "--resume")
    _, found = first.communicate(timeout=900)
    assert first.returncode == 0, found
    _, found = second.communicate(timeout=300)
    assert second.returncode == 0, found
    assert directory.metrics.read_text().count("\n") == STEPS
    assert (directory.models / "sparse" / "model.safetensors").is_file()


@pytest.mark.slow
def test_where_a_rank_of_another_node_is_killed_node_0_says_so_and_both_end(two_nodes):
    config, first, second = two_nodes(1000)
    metrics = RunDirectory(config.directory).metrics
    wait_until(lambda: metrics.is_file() or None not in (first.poll(), second.poll()), 900)
    children = psutil.Process(second.pid).children()
    # Beside it is the fork server.
    (supervisor,) = (child for child in children if command_words(child)[-1:] == ["(trainer-1)"])
    (rank,) = supervisor.children()
    started = family(first.pid)
    os.kill(rank.pid, signal.SIGKILL)
    _, found = first.communicate(timeout=300)
    assert first.returncode == 1
    assert found.startswith("exprl: trainer-1 was killed by signal 9 (SIGKILL)"), found
    second.communicate(timeout=300)
    assert second.returncode == 0
    assert not left_behind([*started, supervisor])
