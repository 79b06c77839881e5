"""The judge against servers that fail: retries, hedging, refusals, and nothing left running behind."""

import asyncio
import math
import zlib
from contextlib import AsyncExitStack

import pytest
from helpers.faulty_server import FaultyServer, endpoint, listening, sglang_client
from helpers.judge_parts import PROBLEM, make_judge

from exprl_megatron.config.judging import JudgeConfig
from exprl_megatron.errors import ServerError, UserError
from exprl_megatron.judging.judgement import Abstained, Scored
from exprl_megatron.problems.problem import Problem, Reference
from exprl_megatron.serving.openai_endpoint import judge_endpoints
from exprl_megatron.utils.ports import free_ports

FOUR = Scored(0.75, "Score: 4")


def _run(servers, ask, client=sglang_client, **config):
    """`await ask(judge)` with the servers listening."""
    if client is endpoint:
        config["endpoints"] = ("http://as-the-client-says/v1",)

    async def run():
        async with listening(*servers), AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(client(server)) for server in servers]
            return await ask(make_judge(*clients, **config))

    return asyncio.run(run())


def _one(judge):
    return judge.grade(PROBLEM, "1")


def _in_order(home, other):
    """The two servers, so that PROBLEM's requests go to `home` first."""
    return (other, home) if zlib.crc32(PROBLEM.id.encode()) % 2 else (home, other)


@pytest.mark.parametrize("client", [sglang_client, endpoint])
@pytest.mark.parametrize("fault", ["drop", 500, 503, 429])
def test_a_transport_error_is_tried_again(client, fault):
    server = FaultyServer(fault, fault)
    assert _run([server], _one, client) == FOUR
    assert server.counts["requests"] == 3


def test_every_pause_is_twice_the_one_before():
    server = FaultyServer(503, 503, 503)

    async def timed(judge):
        started = asyncio.get_running_loop().time()
        judgement = await _one(judge)
        return judgement, asyncio.get_running_loop().time() - started, judge.counts["retried"]

    judgement, seconds, retried = _run([server], timed, retry_pause_s=0.1)
    assert (judgement, retried) == (FOUR, 3)
    assert seconds >= 0.1 + 0.2 + 0.4


def test_a_retry_goes_to_the_next_server():
    home, other = FaultyServer("drop", "drop", "drop", "drop"), FaultyServer()
    assert _run(_in_order(home, other), _one) == FOUR
    assert (home.counts["requests"], other.counts["requests"]) == (1, 1)


def test_dead_servers_end_the_run():
    class Dead:
        url = f"http://127.0.0.1:{free_ports(1)[0]}"

    async def run():
        async with sglang_client(Dead, "judge-7") as client:
            await _one(make_judge(client, retries=1, deadline_s=1))

    with pytest.raises(ServerError, match=r"judge-7 .*died or is not reachable"):
        asyncio.run(run())


def test_servers_that_are_up_but_not_well_end_the_run():
    with pytest.raises(ServerError, match="HTTP 503"):
        _run([FaultyServer(*[503] * 9, well=False)], _one, retries=2, retry_pause_s=0.1, deadline_s=1)


def test_a_request_that_fails_everywhere_while_a_server_is_well_is_an_abstention():
    judgement = _run([FaultyServer(*[500] * 9)], _one, retries=2)
    assert judgement.reason == "server-error"
    assert "status 500" in judgement.evidence


@pytest.mark.parametrize("client", [sglang_client, endpoint])
def test_a_request_that_is_not_taken_is_an_abstention(client):
    server = FaultyServer(400)
    assert _run([server], _one, client) == Abstained("refused", "status 400")
    assert server.counts["requests"] == 1


def test_a_straggler_is_hedged_and_the_loser_is_cancelled():
    home, other = FaultyServer("late"), FaultyServer()

    async def one_and_settled(judge):
        judgement = await _one(judge)
        await _until(lambda: home.counts["running"] == 0)
        return judgement, judge.counts

    judgement, counts = _run(_in_order(home, other), one_and_settled, hedge_after_s=10)
    assert judgement == FOUR
    assert home.counts["abandoned"] == 1
    assert (home.counts["requests"], other.counts["requests"]) == (1, 1), "the hedge goes to the other server"
    assert (counts["hedged"], counts["hedge-won"], counts["asked"]) == (1, 1, 2)


def test_a_hedge_that_fails_does_not_harm():
    home, other = FaultyServer(), FaultyServer(*[500] * 9)
    assert _run(_in_order(home, other), _one, hedge_after_s=0.001, retries=0) == FOUR


def test_quick_answers_are_not_hedged():
    home, other = FaultyServer(), FaultyServer()
    assert _run(_in_order(home, other), _one, hedge_after_s=30) == FOUR
    assert other.counts["requests"] == 0


def test_hedges_wait_for_a_slot():
    servers = [FaultyServer(), FaultyServer()]

    async def many(judge):
        problems = [Problem(f"p{i}", "1", Reference("1")) for i in range(12)]
        return await asyncio.gather(*(judge.grade(problem, "1") for problem in problems))

    assert _run(servers, many, concurrency=3, hedge_after_s=0.001) == [FOUR] * 12
    assert sum(server.counts["most-running"] for server in servers) <= 2 * 3
    assert max(server.counts["most-running"] for server in servers) <= 3


@pytest.mark.parametrize("client", [sglang_client, endpoint])
def test_when_a_step_is_abandoned_no_request_is_left_running(client):
    servers = [FaultyServer(*["hang"] * 20), FaultyServer(*["hang"] * 20)]

    async def abandoned(judge):
        grades = [asyncio.create_task(judge.grade(PROBLEM, str(i))) for i in range(5)]
        await _until(lambda: sum(server.counts["running"] for server in servers) == 10)
        for grade in grades:
            grade.cancel()
        await asyncio.gather(*grades, return_exceptions=True)
        await _until(lambda: sum(server.counts["running"] for server in servers) == 0)
        return judge

    judge = _run(servers, abandoned, client, hedge_after_s=0.05)
    assert sum(server.counts["abandoned"] for server in servers) == 10
    assert judge.counts["asked"] == 10


def test_a_judgement_past_its_deadline_leaves_no_request_running():
    server = FaultyServer("late")

    async def late(judge):
        judgement = await _one(judge)
        await _until(lambda: server.counts["running"] == 0)
        return judgement

    assert _run([server], late, deadline_s=10).reason == "timeout"
    assert server.counts["abandoned"] == 1


def test_requests_in_flight_are_bounded():
    server = FaultyServer()

    async def many(judge):
        return await asyncio.gather(*(judge.grade(PROBLEM, str(i)) for i in range(12)))

    assert _run([server], many, concurrency=3) == [FOUR] * 12
    assert server.counts["most-running"] == 3


def test_an_endpoint_gets_the_chat_the_model_and_the_key():
    server = FaultyServer()

    def with_key(server):
        return endpoint(server, api_key="sesame")

    config = {"endpoints": ("http://as-the-client-says/v1",), "template_args": {"enable_thinking": False}}
    assert _run([server], _one, with_key, **config) == FOUR
    (body,) = server.bodies
    assert body["messages"] == [{"role": "user", "content": "REF ### 1 + 1 = 2 TR 1 JUDGE"}]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("the-model", 0, 8)
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    assert "logprobs" not in body
    assert server.headers[0]["Authorization"] == "Bearer sesame"


KEY = "sk-sesame-0123456789"
ENDPOINT = {"endpoints": ("http://as-the-client-says/v1",)}


def _with_key(server):
    return endpoint(server, api_key=KEY)


@pytest.mark.parametrize("status", [400, 401, 403, 429, 500])
def test_a_key_that_an_endpoint_repeats_is_in_no_error(status):
    reply = (f"Incorrect API key provided: {KEY}.", status)
    judgement = _run([FaultyServer(*[reply] * 9)], _one, _with_key, retries=1, **ENDPOINT)
    assert isinstance(judgement, Abstained)
    assert "Incorrect API key provided: [key]" in judgement.evidence and KEY not in judgement.evidence


def test_a_key_in_a_reply_of_another_form_is_in_no_error():
    judgement = _run([FaultyServer(*[f"<html>{KEY}</html>".encode()] * 9)], _one, _with_key, retries=0, **ENDPOINT)
    assert judgement.reason == "server-error"
    assert "<html>[key]</html>" in judgement.evidence


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_request_with_a_reference_does_not_follow_a_redirect_to_another_server(status):
    other = FaultyServer()

    async def run():
        async with listening(other):
            elsewhere = {"Location": f"{other.url}/v1/chat/completions"}
            home = FaultyServer(*[("Moved", status, elsewhere)] * 9)
            async with listening(home), _with_key(home) as client:
                return await _one(make_judge(client, retries=1, **ENDPOINT)), home

    judgement, home = asyncio.run(run())
    assert judgement.reason == "server-error" and f"HTTP {status}: it redirects to" in judgement.evidence
    assert (home.counts["requests"], other.counts["requests"]) == (2, 0)


@pytest.mark.parametrize("reply", [b"", b"<html>Bad gateway</html>", b'{"choices": [', b"[]", b"null", b'"Score: 4"'])
def test_what_is_not_a_reply_is_an_abstention_after_the_retries(reply):
    server = FaultyServer(*[reply] * 9)
    assert _run([server], _one, endpoint, retries=2).reason == "server-error"
    assert server.counts["requests"] == 3


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"message": {"content": None, "refusal": "I will not."}, "finish_reason": "stop"}, "I will not."),
        ({"message": {"content": "Sco"}, "finish_reason": "content_filter"}, "Sco"),
    ],
)
def test_an_endpoint_that_declines_is_an_abstention(choice, said):
    assert _run([FaultyServer({"choices": [choice]})], _one, endpoint) == Abstained("refused", said)


@pytest.mark.parametrize(
    "choice",
    [
        {"message": None, "finish_reason": "stop"},
        {"message": "Score: 4", "finish_reason": "stop"},
        {"message": {"content": 4}, "finish_reason": "stop"},
        {"message": {"content": {"text": "Score: 4"}}, "finish_reason": "stop"},
        {"message": {"content": "Score: 4"}},
        {"message": {"content": "Score: 4"}, "finish_reason": "stop", "logprobs": {"content": ["x"]}},
        {
            "message": {"content": "Score: 4"},
            "finish_reason": "stop",
            "logprobs": {"content": [{"token": "4", "top_logprobs": [{"token": "4", "logprob": 800.0}]}]},
        },
    ],
)
def test_a_reply_in_another_form_is_an_abstention(choice):
    judgement = _run([FaultyServer({"choices": [choice]})], _one, endpoint, retries=0)
    assert judgement.reason == "server-error"


@pytest.mark.parametrize(
    "reply",
    [
        {"message": {"content": [{"type": "text", "text": "Score: "}, {"type": "text", "text": "4"}]}},
        {"message": {"content": [{"type": "reasoning", "text": "Score: 1"}, {"type": "text", "text": "Score: 4"}]}},
        {"message": {"content": ["Score: 4"]}},
        {"message": {"content": "Score: 4", "refusal": ""}, "logprobs": "none"},
        {"message": {"content": "Score: 4", "reasoning_content": "Score: 1"}, "logprobs": None},
    ],
)
@pytest.mark.parametrize("usage", [None, "12", [], {"prompt_tokens": "12", "prompt_tokens_details": "x"}])
def test_parts_of_text_are_read_and_what_else_is_there_does_no_harm(reply, usage):
    server = FaultyServer({"choices": [reply | {"finish_reason": "stop"}], "usage": usage})
    assert _run([server], _one, endpoint).value == 0.75


def test_the_expected_score_is_read_from_an_endpoints_alternatives():
    def token(text, *alternatives):
        return {"token": text, "top_logprobs": [{"token": t, "logprob": math.log(p)} for t, p in alternatives]}

    digit = token(" 4", (" 4", 0.5), (" 5", 0.3), ("4", 0.1), ("x", 0.1))
    tokens = [token("5 of 5? "), token("Score"), token(":"), digit]
    text = "".join(t["token"] for t in tokens)
    reply = {"choices": [{"message": {"content": text}, "finish_reason": "stop", "logprobs": {"content": tokens}}]}
    server = FaultyServer(reply)
    judgement = _run([server], _one, endpoint, score_reading="expected")
    assert judgement.value == pytest.approx(((4 * 0.6 + 5 * 0.3) / 0.9 - 1) / 4)
    assert (server.bodies[0]["logprobs"], server.bodies[0]["top_logprobs"]) == (True, 20)


def test_without_alternatives_the_stated_score_counts():
    assert _run([FaultyServer()], _one, endpoint, score_reading="expected") == FOUR


def test_the_key_comes_from_the_environment(monkeypatch):
    config = JudgeConfig(model="m", endpoints=("http://a/v1", "http://b/v1/"), api_key_variable="JUDGE_KEY_OF_TEST")
    with pytest.raises(UserError, match="JUDGE_KEY_OF_TEST"):
        judge_endpoints(config)
    monkeypatch.setenv("JUDGE_KEY_OF_TEST", "sesame")
    endpoints = judge_endpoints(config)
    assert [(e.name, e.url, e.model) for e in endpoints] == [
        ("judge-0", "http://a/v1", "default"),
        ("judge-1", "http://b/v1", "default"),
    ]


async def _until(condition):
    async with asyncio.timeout(120):
        while not condition():
            await asyncio.sleep(0.01)
