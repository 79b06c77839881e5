"""What `make chaos` is made of finds what it is there to find: garbage, open doors, numbers that no server sent."""

import asyncio
import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from aiohttp import ClientSession, web
from benchmarks import strangers
from benchmarks.chaos import FaultedRun
from benchmarks.fault_proxy import FaultProxy
from benchmarks.flat_replies import flatten
from benchmarks.garbage import OF_BYTES, OF_FIELDS, OF_LOG_PROBS, garbled, is_sample, made
from benchmarks.learned import Replies

from exprl_megatron.config.load import load_config
from exprl_megatron.judging.judgement import Abstained, Scored
from exprl_megatron.processes.starter import Starter
from exprl_megatron.rollout.group import GradedTrace, Group
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.serving.generation import ExpectedReply, read_generation, reply_limit
from exprl_megatron.utils.text_check import TextCheck

CHAOS = Path("recipes/configs/chaos.yaml")
TOKENS = (b"", b"Score", b": ", b"3", b"5", b"\n")
ASKED = ExpectedReply(max_new_tokens=8, vocabulary=len(TOKENS), text_check=TextCheck(TOKENS))
IDS = [1, 2, 3, 0]


def reply(log_probs=True, flat=False):
    meta = {"finish_reason": {"type": "stop"}, "weight_versions": [{"version": "v0", "start": 0, "end": len(IDS)}]}
    if log_probs:
        meta["output_token_logprobs"] = [[-0.5, token, None] for token in IDS]
    record = {"text": "Score: 3", "output_ids": IDS, "meta_info": meta}
    if flat:
        flatten(record)
    return json.dumps(record, separators=(",", ":"), allow_nan=False).encode()


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", [*OF_BYTES, *OF_FIELDS, *OF_LOG_PROBS])
def test_every_kind_of_garbage_is_refused(kind, flat):
    assert read_generation(reply(flat=flat), ASKED).text == "Score: 3" and is_sample(reply(flat=flat))
    garbage = made(kind, reply(flat=flat))
    with pytest.raises((ValueError, RecursionError)):
        if len(garbage) > reply_limit(8):
            raise ValueError("HttpClient reads no more than the limit")
        read_generation(garbage, ASKED)


def test_garbage_can_be_made_of_a_reply_without_log_probs_too():
    chance = random.Random(0)
    kinds = {garbled(reply(log_probs=False), chance)[0] for _ in range(400)}
    assert kinds == {*OF_BYTES, *OF_FIELDS}
    assert {garbled(reply(flat=True), chance)[0] for _ in range(400)} == {*kinds, *OF_LOG_PROBS}


def test_a_reply_without_tokens_is_no_sample():
    assert not is_sample(b'{"text":"","output_ids":[],"meta_info":{"output_token_logprobs":[]}}')


def answering(status):
    async def answer(request):
        await request.read()
        return web.json_response({"path": request.path}, status=status(request))

    return answer


async def with_server(status, work):
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answering(status))
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return await work(runner.addresses[0][1])
    finally:
        await runner.cleanup()


def test_a_door_that_is_open_to_a_stranger_is_found():
    def found(status):
        return asyncio.run(
            with_server(status, lambda port: strangers.let_in(f"http://127.0.0.1:{port}", strangers.SERVER))
        )

    assert found(lambda request: 401) == []
    assert found(lambda request: 200 if request.path == "/flush_cache" else 401) == ["POST /flush_cache: HTTP 200"] * 4
    half_open = found(lambda request: 401 if "Authorization" not in request.headers else 400)
    assert len(half_open) == 3 * len(strangers.SERVER)


def test_a_proxy_passes_replies_on_and_changes_those_that_it_is_to_change():
    async def ask(port):
        proxy = FaultProxy()
        proxy.target = ("127.0.0.1", port)
        heard = []

        def change(line, body):
            heard.append((line, json.loads(body)["path"]))
            return b"[]" if "/b" in line else body

        proxy.on_reply = change
        try:
            async with ClientSession() as session:
                answers = []
                for path in ("/a", "/b", "/c"):
                    async with session.post(proxy.url + path, json={"large": "x" * 200_000}) as answer:
                        answers.append(await answer.json())
            return answers, heard
        finally:
            await asyncio.to_thread(proxy.close)

    answers, heard = asyncio.run(with_server(lambda request: 200, ask))
    assert answers == [{"path": "/a"}, [], {"path": "/c"}]
    assert heard == [(f"POST {path} HTTP/1.1", path) for path in ("/a", "/b", "/c")]


@pytest.mark.parametrize("flat", [False, True])
def test_a_trace_or_a_score_that_no_server_sent_is_found(flat):
    replies = Replies()
    replies.add("policy-0", reply(flat=flat))
    replies.add("judge-0", reply(log_probs=False))
    trace = Trace("p", 0, [7], IDS, [-0.5] * 4, "Score: 3", "stop", (("v0", 0, 4),))
    sent = GradedTrace(trace, Scored(0.5, "Score: 3"))

    def unsent(member):
        return list(replies.unsent(Group("p", (member,))))

    assert unsent(sent) == [] == unsent(replace(sent, judgement=Abstained("server-error", "what an error says")))
    others = ({"log_probs": [-0.5, -0.5, -0.5, -0.25]}, {"token_ids": [1, 2, 4, 0]}, {"text": "Score: 5"})
    for other in others:
        assert unsent(replace(sent, trace=replace(trace, **other))) == ["sample 0 is of no server"]
    assert unsent(replace(sent, judgement=Scored(1.0, "Score: 5"))) == ["the score of sample 0 is of no judge"]


def test_a_run_under_faults_has_the_servers_and_the_ranks_of_its_config(tmp_path, monkeypatch):
    names = []

    def start(self, name, *_, **__):
        names.append(name)
        ended = {method: lambda *_: 0 for method in ("poll", "wait", "kill", "terminate", "send_signal")}
        return SimpleNamespace(pid=2**22 + 1, returncode=0, **ended)  # above every process id

    monkeypatch.setattr(Starter, "start", start)
    config = load_config(CHAOS, [f"directory={tmp_path / 'run'}"])
    with FaultedRun(config):
        servers = [f"policy-{number}" for number in range(config.server.count)] + ["judge-0"]
        ranks = [f"trainer-{number}" for number in range(config.policy.layout.world_size)]
        assert sorted(names) == sorted(servers + ranks)
