"""What the launcher says of ranks that fail, by processes that end as ranks do."""

import json
import os
import signal
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
from helpers.processes import wait_until

from exprl_megatron.config.policy import Layout
from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.errors import RunStopped, UserError
from exprl_megatron.launch import ranks as module
from exprl_megatron.launch.exit_reports import RankFailed, RankKilled
from exprl_megatron.launch.nodes import Node
from exprl_megatron.launch.ranks import TrainerRanks
from exprl_megatron.processes.starter import Starter
from exprl_megatron.processes.supervise import supervised_command
from exprl_megatron.runs.directory import RunDirectory

LOST = {"status": 1, "message": "trainer 1 failed: RuntimeError: Connection closed by peer", "unexpected": True}
ENDS = """
import json, os, signal, sys, time
end = json.loads(sys.argv[1])[int(os.environ["RANK"])]
time.sleep(end.get("after", 0))
if "report" in end:
    open(f"{sys.argv[2]}/trainer-{os.environ['RANK']}.end", "w").write(json.dumps(end["report"]))
if "signal" in end:
    os.kill(os.getpid(), end["signal"])
sys.exit(end.get("status", 1))
"""
SHOWS = """
import json, os, pathlib, sys
target = pathlib.Path(sys.argv[1])
target.with_suffix(".part").write_text(json.dumps(dict(os.environ)))
target.with_suffix(".part").rename(target)
"""
BEATS = """
import time
from exprl_megatron.processes.heartbeat import start_heartbeat
start_heartbeat()
print("beats", flush=True)
time.sleep(300)
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """`start(command, count)`: ranks that are this command instead of a trainer."""
    directory = RunDirectory(tmp_path)
    directory.logs.mkdir()
    started = []

    def start(command: list[str], count: int, **server) -> TrainerRanks:
        monkeypatch.setattr(
            "exprl_megatron.processes.starter.supervised_command",
            lambda _, grace_s: supervised_command(command, grace_s),
        )
        config = SimpleNamespace(
            policy=SimpleNamespace(layout=Layout(dp=count)), server=ServerConfig(**server), directory=str(tmp_path)
        )
        started.append(TrainerRanks(directory, config, directory.registry))
        return started[-1]

    yield start
    for ranks in started:
        ranks.stop()


def cause(start, tmp_path, monkeypatch, *ends: dict) -> Exception:
    # All end; a loaded machine may start one a good while after another.
    monkeypatch.setattr(module, "_CAUSE_GRACE_S", 60.0)
    ranks = start([sys.executable, "-S", "-c", ENDS, json.dumps(ends), str(tmp_path / "logs")], len(ends))
    with pytest.raises((RunStopped, UserError)) as raised:
        wait_until(lambda: not ranks.running(), 120)
    return raised.value


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS])
def test_a_rank_that_a_signal_ended_is_named_before_one_that_lost_its_connection(start, tmp_path, monkeypatch, number):
    error = cause(start, tmp_path, monkeypatch, {"signal": number, "after": 0.5}, {"report": LOST})
    assert isinstance(error, RankKilled)
    assert str(error).startswith(f"trainer-0 was killed by signal {int(number)} ({number.name})")
    assert ("lack of memory" in str(error)) == (number == signal.SIGKILL)


def test_a_sentence_of_ours_comes_before_ranks_that_abort_for_it(start, tmp_path, monkeypatch):
    found = {"status": 1, "message": "Too many abstentions.", "unexpected": False}
    error = cause(start, tmp_path, monkeypatch, {"signal": signal.SIGABRT}, {"report": LOST}, {"report": found})
    assert str(error) == "Too many abstentions."


def test_a_rank_that_aborts_comes_before_the_connections_that_others_lost(start, tmp_path, monkeypatch):
    assert str(cause(start, tmp_path, monkeypatch, {"report": LOST}, {"signal": signal.SIGABRT})).startswith(
        "trainer-1 was killed by"
    )


def test_of_an_unexpected_error_alone_its_message_is_shown(start, tmp_path, monkeypatch):
    error = cause(start, tmp_path, monkeypatch, {"report": LOST}, {"status": 1})
    assert isinstance(error, RankFailed) and str(error) == LOST["message"]


def test_the_word_of_an_earlier_attempt_is_not_taken_for_that_of_this_one(start, tmp_path, monkeypatch):
    (tmp_path / "logs" / "trainer-0.end").write_text(json.dumps({**LOST, "message": "old"}))
    assert str(cause(start, tmp_path, monkeypatch, {"status": 3})).startswith(
        "trainer-0 ended with status 3; continue with --resume."
    )


def test_ranks_that_fail_between_two_looks_have_not_ended_well(start, monkeypatch):
    ranks, looks = start([sys.executable, "-S", "-c", "import time; time.sleep(300)"], 1), iter([None])
    with monkeypatch.context() as patch, pytest.raises(RunStopped, match="trainer-0 ended"):
        patch.setattr(ranks._processes[0], "poll", lambda: next(looks, 1))
        ranks.running()


@pytest.mark.slow
def test_a_stopped_rank_is_found_by_its_silence_and_ended(start, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SILENCE_S", 8.0)
    ranks = start([sys.executable, "-c", BEATS], 2)
    wait_until(lambda: "beats" in (tmp_path / "logs" / "trainer-1.log").read_text(), 120)
    assert ranks.running()
    (rank,) = psutil.Process(ranks.pids[1]).children()
    rank.suspend()
    with pytest.raises(RunStopped, match=r"trainer-1 .* sent no heartbeat for 8 s, its state is stopped; check what"):
        wait_until(lambda: not ranks.running(), 120)
    ranks.stop()
    assert not rank.is_running()


def test_the_time_that_starting_takes_is_not_silence(start, monkeypatch):
    """The fork server imports before it forks the first rank, from a cold disk for a minute."""
    monkeypatch.setattr(module, "SILENCE_S", 1.0)
    begin = Starter.start

    def start_late(*arguments, **settings):
        time.sleep(1.1)
        return begin(*arguments, **settings)

    monkeypatch.setattr(Starter, "start", start_late)
    assert start([sys.executable, "-S", "-c", "import time; time.sleep(300)"], 2).running()


def test_a_rank_that_waits_in_its_main_thread_is_not_silent(start, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SILENCE_S", 60.0)
    ranks = start([sys.executable, "-c", BEATS], 1)
    wait_until(lambda: max(pulse.silent_s() for pulse in ranks._pulses.values()) > 1, 60)
    wait_until(lambda: max(pulse.silent_s() for pulse in ranks._pulses.values()) < 0.5, 60)
    assert ranks.running()


def test_ctrl_c_at_a_terminal_reaches_no_rank(start, tmp_path):
    ranks = start([sys.executable, "-c", BEATS], 1)
    wait_until(lambda: psutil.Process(ranks.pids[0]).children(), 120)
    (rank,) = psutil.Process(ranks.pids[0]).children()
    for pid in (ranks.pids[0], rank.pid):
        os.kill(pid, signal.SIGINT)
    time.sleep(1.0)
    assert ranks.running() and rank.is_running()


def test_a_rank_is_started_with_the_environment_that_its_servers_arguments_demand(start, tmp_path, monkeypatch):
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "1")
    for name in ("NCCL_NVLS_ENABLE", "NCCL_ALGO", "CUDA_DEVICE_MAX_CONNECTIONS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    shown = tmp_path / "environment.json"
    start([sys.executable, "-S", "-c", SHOWS, str(shown)], 1, tp=2, extra_args=["--enable-deterministic-inference"])
    wait_until(shown.is_file, 120)
    found = json.loads(shown.read_text())
    # SGLang's own values for such servers, the user's 1, and what Megatron's scripts export.
    wanted = {"NCCL_CUMEM_ENABLE": "1", "NCCL_NVLS_ENABLE": "0", "NCCL_ALGO": "allreduce:tree"}
    wanted |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "NVTE_FLASH_ATTN_V4": "0", "OMP_NUM_THREADS": "1"}
    wanted |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    assert {name: found.get(name) for name in wanted} == wanted


class Started:
    """A starter: keeps the environment of each rank, and starts nothing."""

    def __init__(self):
        self.environments = {}

    def start(self, name, command, environment, *_, **settings):
        self.environments[name] = environment


@pytest.mark.parametrize(("node", "first"), [(Node(), 0), (Node(1, 2, "head", 9000), 2)])
def test_a_rank_knows_its_place_among_all_ranks_and_on_its_node_and_where_they_meet(tmp_path, node, first):
    (tmp_path / "logs").mkdir()
    directory, starter = RunDirectory(tmp_path), Started()
    layout = Layout(dp=2 * node.nodes)
    config = SimpleNamespace(policy=SimpleNamespace(layout=layout), server=ServerConfig(), directory=str(tmp_path))
    TrainerRanks(directory, config, directory.registry, node, starter)
    found = starter.environments
    assert list(found) == [f"trainer-{first}", f"trainer-{first + 1}"]
    for local, environment in enumerate(found.values()):
        named = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
        assert [environment[name] for name in named] == [
            *map(str, (first + local, local, layout.world_size)),
            node.host,
        ]
    assert len({environment["MASTER_PORT"] for environment in found.values()}) == 1
