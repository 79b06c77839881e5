"""The beginnings of a trace are asked about in one request, and what becomes of each is as if it had been alone."""

import asyncio
import zlib
from contextlib import AsyncExitStack

import pytest
from helpers.faulty_server import VERDICT, FaultyServer, endpoint, listening, sglang_client
from helpers.judge_parts import PROBLEM, PROMPT, Scripted, make_judge

from exprl_megatron.judging.judgement import Abstained, Scored
from exprl_megatron.judging.store import JudgementStore

FOUR = Scored(0.75, VERDICT)
PREFIXES = ("1", "1 +", "1 + 1")
READ = ""
"""What answers the request for no tokens that comes first."""


def judged(*servers, texts=PREFIXES, client=sglang_client, before=lambda judge: (), **config):
    """The judgements on `texts`, and the judge; `before(judge)` are coroutines that run beside it."""
    if client is endpoint:
        config["endpoints"] = ("http://as-the-client-says/v1",)

    async def run():
        async with listening(*servers), AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(client(server)) for server in servers]
            judge = make_judge(*clients, prefix_prompt=str(PROMPT), **config)
            judgements, *_ = await asyncio.gather(judge.grade_prefixes(PROBLEM, texts), *before(judge))
            return judgements, judge

    return asyncio.run(run())


def of_one(text):
    """The request that asks about `text` alone."""
    server = FaultyServer()
    judged(server, texts=[text])
    return server.bodies[0]


def test_a_trace_costs_two_requests_whatever_the_number_of_its_beginnings():
    for texts in (PREFIXES, [f"1{' + 1' * count}" for count in range(9)]):
        server = FaultyServer(READ)
        judgements, judge = judged(server, texts=texts, context_tokens=640)
        assert judgements == [FOUR] * len(texts)
        assert server.counts["requests"] == 2 and judge.counts["asked"] == 1 + len(texts)


def test_each_question_is_the_one_that_is_asked_alone_with_its_own_seed():
    server = FaultyServer(READ)
    judged(server)
    together = server.bodies[1]
    alone = [of_one(text) for text in PREFIXES]
    assert together["input_ids"] == [body["input_ids"] for body in alone]
    defaults = {"top_p": 1.0, "top_k": -1, "stop_token_ids": []}  # of SGLang itself
    assert [defaults | params for params in together["sampling_params"]] == [b["sampling_params"] for b in alone]
    assert len({params["sampling_seed"] for params in together["sampling_params"]}) == 3
    assert together["return_logprob"] == alone[0]["return_logprob"] is False


@pytest.mark.parametrize(
    "failure",
    [
        400,
        500,
        "drop",
        b"no JSON",
        b"[1, 2, 3]",
        [VERDICT, VERDICT],
        [VERDICT, VERDICT, VERDICT, VERDICT],
        [VERDICT, {"text": "Score: 5"}, VERDICT],
        [VERDICT, {"text": VERDICT, "output_ids": [1] * 99, "meta_info": {}}, VERDICT],
    ],
)
def test_where_the_request_fails_each_is_asked_alone_and_fails_alone(failure):
    server = FaultyServer(READ, failure, 400)
    judgements, _ = judged(server)
    refused = [judgement for judgement in judgements if judgement == Abstained("refused", "status 400")]
    assert len(refused) == 1 and judgements.count(FOUR) == 2
    assert server.counts["requests"] == 2 + 3


def test_what_cannot_be_read_is_asked_for_again_alone():
    server = FaultyServer(READ, ["Score: 2", "hm", "Score: 9"], "Score: 5", "hm")
    judgements, judge = judged(server, reask_temperature=0.4)
    assert judgements[0].value == 0.25 and sorted(str(j) for j in judgements[1:]) == sorted(
        [str(Scored(1.0, "Score: 5")), str(Abstained("unreadable", "hm"))]
    )
    first = server.bodies[1]["sampling_params"]
    again = {body["sampling_params"]["sampling_seed"]: body["sampling_params"] for body in server.bodies[2:]}
    assert sorted(again) == sorted(params["sampling_seed"] + 1 for params in first[1:])
    assert {params["temperature"] for params in again.values()} == {0.4}
    assert judge.counts["reasked"] == 2 and server.counts["requests"] == 4


def test_one_that_is_too_long_is_not_sent():
    server = FaultyServer()
    *short, last = judged(server, texts=("1", "1 +", "1 + 1 " * 9), context_tokens=26)[0]
    assert short == [FOUR, FOUR] and last.reason == "too-long"
    assert [len(body["input_ids"]) for body in server.bodies] == [2]


def test_past_the_deadline_all_are_abstentions_and_no_request_is_left_running():
    server = FaultyServer(READ, "late")

    async def settled(judge):
        async with asyncio.timeout(120):
            while server.counts["abandoned"] == 0:
                await asyncio.sleep(0.01)

    judgements, _ = judged(server, before=lambda judge: [settled(judge)], deadline_s=10)
    assert [judgement.reason for judgement in judgements] == ["timeout"] * 3
    assert server.counts["running"] == 0


def test_questions_in_flight_are_bounded_and_those_of_a_request_count_each():
    server = FaultyServer()
    traces = [[f"{number} {text}" for text in PREFIXES] for number in range(1, 5)]

    def others(judge):
        return [judge.grade_prefixes(PROBLEM, texts) for texts in traces]

    judgements, _ = judged(server, before=others, concurrency=4)
    assert judgements == [FOUR] * 3
    assert server.counts["most-questions"] <= 4 and server.counts["requests"] == 2 * 5


def test_more_questions_than_may_be_in_flight_go_in_several_requests():
    server = FaultyServer(READ)
    texts = [f"1{' + 1' * count}" for count in range(5)]
    assert judged(server, texts=texts, concurrency=2)[0] == [FOUR] * 5
    assert server.counts["most-questions"] == 2 and server.counts["requests"] == 1 + 3


def test_a_straggling_request_is_sent_to_a_second_server_too():
    home, other = FaultyServer(READ, "late"), FaultyServer()
    servers = (other, home) if zlib.crc32(PROBLEM.id.encode()) % 2 else (home, other)
    judgements, judge = judged(*servers, hedge_after_s=10)
    assert judgements == [FOUR] * 3
    assert (judge.counts["hedged"], judge.counts["hedge-won"]) == (3, 3)


def test_an_endpoint_is_asked_about_each_alone():
    server = FaultyServer()
    assert judged(server, client=endpoint)[0] == [FOUR] * 3
    assert server.counts["requests"] == 3


def test_equal_beginnings_are_asked_about_once_be_they_of_one_trace_or_of_two(tmp_path):
    server = FaultyServer()
    with JudgementStore(tmp_path / "s.sqlite") as store:

        def other(judge):
            return [judge.grade_prefixes(PROBLEM, ("1", "1 +", "1 + 2"))]

        judgements, judge = judged(server, texts=("1", "1", "1 +", "1 + 1"), before=other, store=store)
        assert [judgement.value for judgement in judgements] == [0.75] * 4
        assert judge.counts["asked"] == 2 + 4 and judge.counts["stored"] == 3
        assert len(store.newest(9)) == 4


def test_a_trace_that_is_given_up_leaves_its_questions_to_others(tmp_path):
    client = Scripted(READ, *[VERDICT] * 3, READ, *[VERDICT] * 3, pause=0.2)
    with JudgementStore(tmp_path / "s.sqlite") as store:
        judge = make_judge(client, prefix_prompt=str(PROMPT), store=store)

        async def run():
            given_up = asyncio.create_task(judge.grade_prefixes(PROBLEM, PREFIXES))
            while len(client.calls) < 4:
                await asyncio.sleep(0.01)
            other = asyncio.create_task(judge.grade_prefixes(PROBLEM, PREFIXES))
            await asyncio.sleep(0.05)
            given_up.cancel()
            return await asyncio.wait_for(other, 120)

        assert [judgement.value for judgement in asyncio.run(run())] == [0.75] * 3
