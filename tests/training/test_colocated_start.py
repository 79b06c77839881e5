"""Colocated: when servers sleep and when the trainer takes memory, at a run's start and when it is resumed."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers.runs import run_config, write_problems

from exprl_megatron.errors import RunStopped
from exprl_megatron.policy.policy import Policy
from exprl_megatron.policy.world import enter_world, leave_world
from exprl_megatron.runs.directory import RunDirectory
from exprl_megatron.serving.registry import RegisteredServer, Registry
from exprl_megatron.training import assemble as assembly
from exprl_megatron.training import phase_switch, run_saves

ASLEEP = "/release_memory_occupation"
ORDER = [ASLEEP, "policy", "stage"]


class Answering(BaseHTTPRequestHandler):
    """A server as the pool sees it, which notes what it is asked to do with its memory."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
        if "memory_occupation" in self.path:
            self.server.events.append(self.path)
            self.server.tags.append(body["tags"])
        closed = self.path == "/end_weight_update"
        answer = {"success": not closed, "message": "no weight-update session is open"}
        written = json.dumps(answer).encode()
        self.send_response(400 if closed else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(written)))
        self.end_headers()
        self.wfile.write(written)

    def do_GET(self):
        written = json.dumps({"weight_version": "v0", "model_path": "m"}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(written)))
        self.end_headers()
        self.wfile.write(written)

    def log_message(self, *_):
        return None


@pytest.fixture
def server(monkeypatch):
    """A server on the trainer's GPU; everyone believes that there is one."""
    monkeypatch.setattr("exprl_megatron.serving.server_pool.uses_cuda", lambda: True)
    made = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    made.events, made.tags = [], []
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()


@pytest.fixture
def events(server, monkeypatch):
    """What happened, in order: the server's part, and the trainer's from a real policy."""

    class Noted(Policy):
        def __init__(self, *arguments):
            server.events.append("policy")
            super().__init__(*arguments)

        def begin_stage(self, *arguments, **settings):
            server.events.append("stage")
            super().begin_stage(*arguments, **settings)

    def load(*arguments):
        server.events.append("checkpoint")
        load_checkpoint(*arguments)

    load_checkpoint = run_saves.load_checkpoint
    monkeypatch.setattr(assembly, "Policy", Noted)
    monkeypatch.setattr(run_saves, "load_checkpoint", load)
    return server.events


@pytest.fixture
def begin(tmp_path, tiny_model, server):
    """`begin(kind)` makes the run and opens its stage, as every attempt at it does; it closes the attempt before."""
    model, problems = tiny_model("qwen3"), write_problems(tmp_path / "problems.jsonl")
    stage = {
        "kind": "sparse-rl",
        "name": "sparse",
        "steps": 3,
        "problems": {"source": str(problems)},
        "problems_per_step": 2,
        "group_size": 3,
        "sampling": {"max_new_tokens": 24},
    }

    runs = []

    def close() -> None:
        while runs:
            runs.pop().close()

    def begin(kind: str, resume: bool = False, stage_kind: str = "sparse-rl", **placement):
        close()
        policy = {"model": str(model), "max_tokens": 160}
        config = run_config(
            tmp_path / "run",
            model,
            model,
            problems,
            policy=policy,
            stages=[stage | {"kind": stage_kind}],
            placement={"kind": kind} | placement,
        )
        paths = RunDirectory(config.directory)
        paths.claim(config, resume).release()
        registry = Registry(paths.registry)
        url = f"http://127.0.0.1:{server.server_port}"
        registry.register(RegisteredServer("policy", "policy-0", url, "", "a"))
        run = assembly.assemble(config, paths, registry, lambda error: None)
        runs.append(run)
        opened = next(run.remaining_stages())
        run.open_stage(opened)
        return run, opened

    enter_world(run_config(tmp_path, model, model, problems, policy={"model": str(model)}).policy.layout)
    yield begin
    close()
    leave_world()


def test_the_servers_sleep_before_the_policy_and_its_optimizer_take_memory(begin, events, server):
    begin("colocated")
    assert events == ORDER
    assert server.tags == [["kv_cache", "weights"]], "SGLang dies where memory is given up twice"


def test_a_resumed_run_waits_for_the_servers_memory_too(begin, events):
    run, stage = begin("colocated")
    with run.step(stage, 1):
        pass
    run.checkpoint_if_due(stage, 1)
    events.clear()
    begin("colocated", resume=True)
    assert events == [*ORDER, "checkpoint"]


def test_servers_on_devices_of_their_own_do_not_sleep(begin, events):
    begin("separate")
    assert events == ["policy", "stage"]


def test_a_stage_takes_no_memory_while_sleeping_servers_hold_more_than_they_may(begin, events, monkeypatch):
    monkeypatch.setattr(phase_switch, "_foreign_memory", lambda device: 3 * 2**30)
    with pytest.raises(RunStopped, match=r"the servers left 3\.00 GiB .* than placement.max_asleep_gb \(2\)"):
        begin("colocated", max_asleep_gb=2)
    assert events == [ASLEEP, "policy"]


def test_a_run_has_the_stages_of_the_users_own(begin, events):
    run, stage = begin("separate", stage_kind="examples.stages:SecondAttempt")
    assert run._rollouts.custom_stage(stage).samples
