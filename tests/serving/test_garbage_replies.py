"""Replies that no server of ours should give: each is refused by name and field, and another server is asked."""

import asyncio
import gzip
import json
import threading
import tracemalloc
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from exprl_megatron.config.serving import SamplingConfig, ServerConfig
from exprl_megatron.errors import ServerError
from exprl_megatron.rollout.sampler import Prompt, sample_groups
from exprl_megatron.serving import generation, generation_client
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.generation import reply_limit
from exprl_megatron.serving.registry import RegisteredServer, Registry
from exprl_megatron.serving.server_pool import ServerPool
from exprl_megatron.utils.text_check import TextCheck

VOCABULARY, ASKED = 100, 10
SAMPLING = SamplingConfig(max_new_tokens=ASKED)
TOKENS = [b"?"] * 5 + [b"a", b"b", b"c"] + [b"?"] * (VOCABULARY - 8)
CHECK = TextCheck(TOKENS)


def reply(ids=(5, 6, 7), log_prob=-0.5, text="abc", **meta):
    entries = [[log_prob, token, None] for token in ids]
    spans = [{"version": "v0", "start": 0, "end": len(ids)}]
    meta = {"finish_reason": {"type": "stop"}, "prompt_tokens": 2, "output_token_logprobs": entries} | meta
    return {"text": text, "output_ids": list(ids), "meta_info": {"weight_versions": spans} | meta}


def body(record):
    return json.dumps(record, separators=(",", ":")).encode()


def spans(*bounds):
    return reply(weight_versions=[{"version": "v0", "start": start, "end": end} for start, end in bounds])


def entries(*values):
    return reply(output_token_logprobs=list(values))


GOOD = body(reply())
RAW = {
    "NaN": (GOOD.replace(b"[-0.5,6", b"[NaN,6"), "output_token_logprobs"),
    "-Infinity": (GOOD.replace(b"[-0.5,6", b"[-Infinity,6"), "output_token_logprobs"),
    "inf": (GOOD.replace(b"[-0.5,6", b"[inf,6"), "output_token_logprobs has a log-prob that is not finite"),
    "-1e400": (GOOD.replace(b"[-0.5,6", b"[-1e400,6"), "output_token_logprobs"),
    "id 1e400": (GOOD.replace(b'"output_ids":[5', b'"output_ids":[1e400'), "output_ids"),
    "count 1e400": (GOOD.replace(b'"prompt_tokens":2', b'"prompt_tokens":1e400'), "prompt_tokens"),
    "count of 5000 digits": (GOOD.replace(b'"prompt_tokens":2', b'"prompt_tokens":' + b"9" * 5000), "prompt_tokens"),
    "deep lists": (b"[" * 30_000, "RecursionError|nested|Expected"),
    "deep text": (GOOD.replace(b'"abc"', b"[" * 30_000 + b"]" * 30_000), "text|RecursionError"),
    "deep unknown field": (b'{"x":' + b"[" * 30_000 + b"]" * 30_000 + b"," + GOOD[1:], "RecursionError|nested"),
    "HTML": (b"<html><body>502 Bad Gateway</body></html>", "asked /generate: .*HTML|malformed|JSON"),
    "empty": (b"", "truncated|JSON"),
    "half": (GOOD[: len(GOOD) // 2], "truncated|output_token_logprobs"),
    "no UTF-8": (GOOD.replace(b'"abc"', b'"\xff\xfe"'), "UTF|utf|unicode"),
    "two texts": (GOOD[:-1] + b',"text":"other"}', '"text" is there 2 times'),
    "two lists of ids": (GOOD[:-1] + b',"output_ids":[1,2,3]}', '"output_ids" is there 2 times'),
    "two lists of log-probs": (
        GOOD.replace(b'"prompt_tokens"', b'"output_token_logprobs":[[-9,5,null]],"prompt_tokens"'),
        '"output_token_logprobs" is there 2 times',
    ),
    "null": (b"null", "object"),
    "list": (b"[]", "object"),
    "nothing": (b"{}", "text"),
}
MADE = {
    "positive": (reply(log_prob=5.0), "output_token_logprobs has a log-prob above 0, 5"),
    "a little positive": (reply(log_prob=0.01), "output_token_logprobs has a log-prob above 0"),
    "log-probs of others": (entries([-1, 5, None], [-1, 9, None], [-1, 7, None]), "other ids than output_ids"),
    "id beyond the vocabulary": (reply((5, 100, 7)), "output_ids has 100, but the vocabulary has 100 ids"),
    "negative id": (reply((5, -1, 7)), "output_ids has an entry that is not an id"),
    "id as text": (reply((5, "6", 7)), "output_ids|output_token_logprobs"),
    "id as float": (reply((5, 6.0, 7)), "output_ids"),
    "true as id": (reply((5, True, 7)), "output_ids"),
    "too many": (reply(range(11)), "11 output_ids where at most 10 were asked for"),
    "too few log-probs": (entries([-1, 5, None]), "3 output_ids but 1 output_token_logprobs"),
    "null log-prob": (entries([-1, 5, None], [None, 6, None], [-1, 7, None]), "output_token_logprobs"),
    "text log-prob": (entries([-1, 5, None], ["-1", 6, None], [-1, 7, None]), "output_token_logprobs"),
    "no id": (reply(()), "output_ids is empty"),
    "text of other ids": (reply(text="abd"), "text is not that of the 3 output_ids"),
    "text of more ids": (reply(text="abcabc"), "text is not that of the 3 output_ids"),
    "no text": (reply(text=None), "text"),
    "number as text": (reply(text=7), "text"),
    "span too short": (spans((0, 1)), "weight_versions covers 1 tokens, but there are 3"),
    "span too long": (spans((0, 500)), "weight_versions covers 500 tokens, but there are 3"),
    "span with a gap": (spans((0, 1), (2, 3)), "weight_versions has a span from 2 to 3"),
    "spans that overlap": (spans((0, 2), (1, 3)), "weight_versions has a span from 1 to 3"),
    "span backwards": (spans((0, 4), (4, 3)), "weight_versions has a span from 4 to 3"),
    "negative span": (spans((-1, 3)), "weight_versions"),
    "no span": (spans(), "weight_versions covers 0 tokens"),
    "version a number": (reply(weight_versions=[{"version": 0, "start": 0, "end": 3}]), "version"),
    "no version": (reply(weight_versions=None), "weight_versions"),
    "other reason": (reply(finish_reason={"type": "tired"}), "finish_reason"),
    "reason a text": (reply(finish_reason="stop"), "finish_reason"),
    "negative count": (reply(prompt_tokens=-1), "prompt_tokens"),
}
GARBAGE = RAW | {name: (body(record), message) for name, (record, message) in MADE.items()}


class Server:
    """Gives every /generate the same reply, of sampled tokens at least, and else is in order."""

    def __init__(self, said, status=200, headers=None):
        self.said, self.status, self.headers = said, status, headers or {}
        self.sampled = 0

    async def answer(self, request):
        if request.path == "/model_info":
            return web.json_response({"weight_version": "v0", "model_path": "m"})
        if request.path != "/generate":
            return web.json_response({"success": True})
        sampling = (await request.json())["sampling_params"]
        if isinstance(sampling, dict) and sampling["max_new_tokens"] == 0:
            return web.Response(body=body(reply(())))
        self.sampled += 1
        return web.Response(body=self.said, status=self.status, headers=self.headers)

    async def endless(self, request):
        response = web.StreamResponse()
        await response.prepare(request)
        self.sent = 0
        while True:
            await response.write(b" " * 2**16)
            self.sent += 2**16


@asynccontextmanager
async def listening(*servers, handler="answer"):
    runners = []
    try:
        for server in servers:
            app = web.Application()
            app.router.add_route("*", "/{path:.*}", getattr(server, handler))
            runners.append(web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1))
            await runners[-1].setup()
            await web.TCPSite(runners[-1], "127.0.0.1", 0).start()
            server.url = f"http://127.0.0.1:{runners[-1].addresses[0][1]}"
        yield
    finally:
        for runner in runners:
            await runner.cleanup()


def generated(server, handler="answer", text_check=CHECK, **settings):
    async def run():
        async with listening(server, handler=handler), SGLangClient(server.url, "policy-3", deadline_s=20) as client:
            client.vocabulary, client.text_check = VOCABULARY, text_check
            return await client.generate([1, 2], seed=0, **SAMPLING.model_dump(), **settings)

    return asyncio.run(run())


def test_the_reply_that_the_others_are_made_of_is_taken():
    assert generated(Server(GOOD)).token_ids.tolist() == [5, 6, 7]
    assert generated(Server(body(reply(log_prob=1e-6)))).log_probs.tolist() == pytest.approx([1e-6] * 3)


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_is_refused_with_the_server_and_the_field(kind):
    said, message = GARBAGE[kind]
    with pytest.raises(ServerError, match=rf"(?s)policy-3 \(http://.*asked /generate: .*({message})") as refused:
        generated(Server(said))
    assert len(str(refused.value)) < 1000


def generated_all(*replies):
    async def run():
        server = Server(b"[" + b",".join(replies) + b"]")
        async with listening(server), SGLangClient(server.url, "policy-3", deadline_s=20) as client:
            client.vocabulary, client.text_check = VOCABULARY, CHECK
            return await client.generate_all([[1, 2], [3]], [0, 1], **SAMPLING.model_dump())

    return asyncio.run(run())


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_among_several_continuations_is_refused_as_it_is_alone(kind):
    assert [found.token_ids.tolist() for found in generated_all(GOOD, GOOD)] == [[5, 6, 7]] * 2
    with pytest.raises(ServerError, match=r"policy-3 \(http://.*asked /generate: "):
        generated_all(GOOD, GARBAGE[kind][0])


def test_fewer_or_more_continuations_than_were_asked_for_are_refused():
    for count in (0, 1, 3):
        with pytest.raises(ServerError, match=f"{count} continuations where 2 were asked for"):
            generated_all(*[GOOD] * count)


def test_a_long_reply_is_read_in_another_thread_than_the_event_loops(monkeypatch):
    threads = []

    def noted(*arguments):
        threads.append(threading.current_thread())
        return generation.read_generation(*arguments)

    monkeypatch.setattr(generation_client, "read_generation", noted)
    monkeypatch.setattr("exprl_megatron.utils.reply_threads.LONG_REPLY", 2**15)
    for padding in (0, 2**14, 2**16):
        generated(Server(GOOD.replace(b"{", b"{" + b" " * padding, 1)))
    assert [thread.name.partition("_")[0] for thread in threads] == ["MainThread", "replies", "long-replies"]
    with pytest.raises(ServerError, match=r"policy-3 \(http://.*asked /generate: "):
        generated(Server(b" " * 2**16 + GARBAGE["empty"][0]))


@pytest.mark.parametrize("kind", ["two texts", "two lists of ids", "too many", "no span", "deep lists", "empty"])
def test_garbage_is_refused_where_no_log_probs_were_asked_for_too(kind):
    with pytest.raises(ServerError, match=rf"(?s)policy-3 .*({GARBAGE[kind][1]})"):
        generated(Server(GARBAGE[kind][0]), log_probs=False)


@pytest.mark.parametrize(
    ("watched", "message"),
    [
        ([[[-1, 8, None], [-1, 9, None]]] * 2, "output_token_ids_logprobs is of 2 tokens, but there are 3"),
        ([[[-1, 8, None]]] * 3, "output_token_ids_logprobs is not of the 2 ids asked for"),
        ([[[-1, 9, None], [-1, 8, None]]] * 3, "output_token_ids_logprobs is not of the 2 ids asked for"),
        ([[[800, 8, None], [-1, 9, None]]] * 3, "output_token_ids_logprobs has a log-prob that is above 0"),
        ([[["x", 8, None], [-1, 9, None]]] * 3, "output_token_ids_logprobs"),
        (None, "output_token_ids_logprobs is of 0 tokens"),
    ],
)
def test_log_probs_of_watched_ids_are_those_that_were_asked_for(watched, message):
    with pytest.raises(ServerError, match=message):
        generated(Server(body(reply(output_token_ids_logprobs=watched))), watched_ids=(8, 9))


@pytest.mark.parametrize("said", [b"\xff\xfe", b"[" * 30_000, b"{" + b'"error":' * 5 + b"1e400", b"<html>", b""])
@pytest.mark.parametrize("status", [204, 302, 400, 500, 502])
def test_garbage_in_an_error_is_an_error_of_the_server(said, status):
    with pytest.raises(ServerError, match=rf"policy-3 .*refused with HTTP {status}"):
        generated(Server(said, status))


def test_no_more_is_read_than_the_request_can_be_answered_with():
    server = Server(None)
    tracemalloc.start()
    with pytest.raises(ServerError, match=rf"policy-3 .*more than {reply_limit(ASKED)} bytes"):
        generated(server, "endless")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 2**20


def test_what_is_compressed_is_not_unpacked():
    packed = gzip.compress(GOOD + b" " * 50_000_000)
    with pytest.raises(ServerError, match=r"policy-3 .*Content-Encoding gzip"):
        generated(Server(packed, headers={"Content-Encoding": "gzip"}))


def test_the_longest_text_that_tokens_can_have_is_within_the_limit():
    text = "\u2003" * 128 * ASKED
    assert generated(Server(body(reply(range(ASKED), text=text))), text_check=None).text == text


@pytest.mark.parametrize(
    "said", [b"[" * 30_000, b'{"success":true,"success":true}', b"\xff", b"<html>", b"null", b"{}"]
)
def test_garbage_in_reply_to_an_order_is_refused(said):
    async def run():
        server = Server(None)

        async def garbage(request):
            return web.Response(body=said)

        server.answer = garbage
        async with listening(server), SGLangClient(server.url, "policy-3", deadline_s=20) as client:
            for order in (client.begin_weight_update, client.checksums, client.served, client.loaders):
                with pytest.raises(ServerError, match="policy-3 "):
                    await order()

    asyncio.run(run())


WRONG_VERSION = body(reply(weight_versions=[{"version": "v1", "start": 0, "end": 3}]))


OTHER_TEXT = body(reply(text="abd"))


@pytest.mark.parametrize(
    "said", [body(reply(log_prob=5.0)), body(reply((5, 100, 7))), b"[" * 30_000, WRONG_VERSION, OTHER_TEXT]
)
def test_what_one_server_answers_with_garbage_another_is_asked_and_no_trace_is_made_of_it(tmp_path, said):
    bad, good = Server(said), Server(GOOD)

    async def run():
        registry, told = Registry(tmp_path / "servers"), []
        async with listening(bad, good):
            for i, server in enumerate((bad, good)):
                registry.register(RegisteredServer("policy", f"policy-{i}", server.url, "", "a"))
            pool = ServerPool(registry, ServerConfig(count=2), log=told.append, vocabulary=VOCABULARY)
            pool.text_check = CHECK
            try:
                await pool.open()
                assert await pool.prepare("v0")
                await pool.commit("v0")
                asked = [Prompt("a", (1, 2)), Prompt("b", (1, 2))]
                groups = await sample_groups(pool, asked, 2, SAMPLING, lambda *_: 0, weight_versions=["v0"])
            finally:
                await pool.close()
        return groups, told

    groups, told = asyncio.run(run())
    assert [[trace.token_ids.tolist() for trace in group] for group in groups] == [[[5, 6, 7]] * 2] * 2
    assert bad.sampled and any(line.startswith("policy-0 is unhealthy: policy-0 (http://") for line in told)
