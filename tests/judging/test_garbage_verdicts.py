"""Garbage from a judge's server, of SGLang's form and of OpenAI's: the next server is asked, and its score counts."""

import asyncio
import json
import math

import numpy as np
import pytest
from helpers.faulty_server import FaultyServer, endpoint, sglang_client
from helpers.judge_parts import Scripted, Written
from helpers.tokenizer_rules import tokenizer_of
from test_judge_transport import FOUR, _in_order, _one, _run

from exprl_megatron.errors import ServerError
from exprl_megatron.judging.answers import JudgeQuestion, TokenAnswerer
from exprl_megatron.judging.prompt import PromptFrame

RAW = {
    "HTML": b"<html>502</html>",
    "empty": b"",
    "half": b'{"choices":[{"mess',
    "no UTF-8": b'"\xff\xfe"',
    "deep": b"[" * 30_000,
    "null": b"null",
    "nothing": b"{}",
    "text": b'"Score: 4"',
    "two choices fields": b'{"choices":[],"choices":[]}',
    "too long": b" " * 30_000_000,
}


def choice(message=None, **fields):
    message = {"content": "Score: 1"} if message is None else message
    return json.dumps({"choices": [{"message": message, "finish_reason": "stop"} | fields]}).encode()


def log_probs(*alternatives, token="1"):
    return {"content": [{"token": token, "top_logprobs": list(alternatives)}]}


CHATS = {
    "no choices": b'{"choices":[]}',
    "choices null": b'{"choices":null}',
    "choice a text": b'{"choices":["Score: 1"]}',
    "message null": b'{"choices":[{"message":null,"finish_reason":"stop"}]}',
    "message a text": choice("Score: 1"),
    "content a number": choice({"content": 1}),
    "content an object": choice({"content": {"text": "Score: 1"}}),
    "reason null": choice(finish_reason=None),
    "reason a list": choice(finish_reason=["stop"]),
    "token a number": choice(logprobs=log_probs(token=1)),
    "alternative null": choice(logprobs=log_probs(None)),
    "alternative a number": choice(logprobs=log_probs({"token": 1, "logprob": -1.0})),
    "log-prob a text": choice(logprobs=log_probs({"token": "1", "logprob": "-1"})),
    "log-prob NaN": choice(logprobs=log_probs({"token": "1", "logprob": math.nan})),
    "log-prob inf": choice(logprobs=log_probs({"token": "1", "logprob": math.inf})),
    "log-prob 800": choice(logprobs=log_probs({"token": "1", "logprob": 800})),
    "log-prob 1e400": choice(logprobs=log_probs({"token": "1", "logprob": 8.5})).replace(b"8.5", b"1e400"),
    "log-prob of 500 digits": choice(logprobs=log_probs({"token": "1", "logprob": 8.5})).replace(b"8.5", b"9" * 500),
    "two contents": choice().replace(b'"content": "Score: 1"', b'"content": "Score: 1", "content": "Score: 5"'),
}
FORMS = [(sglang_client, kind, said) for kind, said in RAW.items()]
FORMS += [(endpoint, kind, said) for kind, said in (RAW | CHATS).items()]


@pytest.mark.parametrize(("client", "kind", "said"), FORMS, ids=[f"{c.__name__}-{kind}" for c, kind, _ in FORMS])
def test_garbage_is_not_a_verdict_and_the_next_server_is_asked(client, kind, said):
    home, other = FaultyServer(said), FaultyServer()
    reading = "stated" if client is sglang_client else "expected"
    assert _run(_in_order(home, other), _one, client, score_reading=reading) == FOUR
    assert (home.counts["requests"], other.counts["requests"]) == (1, 1)


@pytest.mark.parametrize(
    ("said", "field"),
    [(CHATS["message null"], "message"), (CHATS["log-prob inf"], "logprob"), (CHATS["two contents"], "content")],
)
def test_a_judge_that_has_nothing_but_garbage_abstains_and_says_whose_and_which_field(said, field):
    judgement = _run([FaultyServer(*[said] * 9)], _one, endpoint, retries=1, score_reading="expected")
    assert judgement.reason == "server-error"
    assert "judge-0 (http://" in judgement.evidence and field in judgement.evidence


def test_an_answer_whose_text_or_ids_are_not_the_models_is_the_servers_failure():
    tokenizer = tokenizer_of("qwen")
    ids = np.array(tokenizer("Score: 4", add_special_tokens=False)["input_ids"], np.int32)
    beyond = np.append(ids, 10_000).astype(np.int32)
    question = JudgeQuestion(PromptFrame(()), "", (1, 2), 8, 0.0, 0, 60.0)

    def answered(text, ids):
        client = Scripted(Written(text, token_ids=ids))
        return asyncio.run(TokenAnswerer(client, tokenizer, vocabulary=10_000).answer(question)).text

    assert answered("Score: 4", ids) == "Score: 4"
    assert answered("anything", np.array([9_999], np.int32)) == "anything"
    with pytest.raises(ServerError, match=f"judge-0 .* text is not that of the {len(ids)} output_ids"):
        answered("Score: 5", ids)
    with pytest.raises(ServerError, match=r"judge-0 .* output_ids has 10000, but the vocabulary has 10000 ids"):
        answered("Score: 4", beyond)
