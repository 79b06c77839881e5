"""The experts of a reply; tests/serving/test_real_servers.py compares those of a real server with transformers'."""

import asyncio
import base64
import json

import numpy as np
import pytest

from exprl_megatron.models.routing import Routing
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.generation import ExpectedReply, read_generation
from exprl_megatron.serving.routed_experts import read_routed_experts, sent_bytes

ROUTING = Routing(layers=3, top_k=2, experts=7)
TOKENS = 6


def chosen(rows: int, routing: Routing = ROUTING) -> np.ndarray:
    draw = np.random.default_rng(1)
    tables = [draw.permutation(routing.experts)[: routing.top_k] for _ in range(rows * routing.layers)]
    return np.array(tables, np.int32).reshape(rows, routing.layers, routing.top_k)


def reply(experts: np.ndarray | None, finish: str = "stop") -> bytes:
    meta = {
        "finish_reason": {"type": finish},
        "prompt_tokens": 4,
        "weight_versions": [{"version": "v1", "start": 0, "end": 2}],
        "output_token_logprobs": [[-0.5, 8, None], [-0.25, 9, None]],
    }
    if experts is not None:
        meta["routed_experts"] = base64.b64encode(experts.tobytes()).decode()
    return json.dumps({"text": "t", "output_ids": [8, 9], "meta_info": meta}).encode()


def test_experts_have_a_row_for_each_token_but_the_last():
    body = reply(chosen(5))
    found = read_generation(body, ExpectedReply(routing=ROUTING)).routed_experts
    assert found.dtype == np.uint8 and np.array_equal(found, chosen(5))
    assert read_generation(body).routed_experts is None


def test_many_experts_and_one_token():
    routing = Routing(layers=2, top_k=4, experts=512)
    experts = chosen(1, routing)
    found = read_routed_experts(experts.tobytes(), 2, routing)
    assert found.dtype == np.int16 and np.array_equal(found, experts)
    assert read_routed_experts(b"", 1, routing).shape == (0, 2, 4)
    assert len(base64.b64encode(experts.tobytes())) <= sent_bytes(1, routing)


def _changed(place: tuple[int, ...], value: int) -> np.ndarray:
    experts = chosen(5)
    experts[place] = value
    return experts


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (None, "routed_experts is missing; a server returns it with --enable-return-routed-experts"),
        (chosen(4), "routed_experts has 24 ids, but 5 tokens have 2 experts in each of 3 layers"),
        (chosen(6), "routed_experts has 36 ids, but 5 tokens have"),
        (_changed((4, 2, 1), 7), "an id that is none of the 7 experts'"),
        (_changed((0, 0, 0), -1), "an id that is none of the 7 experts'"),
        (_changed((2, 1), 3), "the same expert twice for a token"),
    ],
)
def test_what_no_router_chose_is_refused(experts, message):
    with pytest.raises(ValueError, match=message):
        read_generation(reply(experts), ExpectedReply(routing=ROUTING))


class Noted(SGLangClient):
    """Notes what is asked, and with what reply's size in mind."""

    async def _exchange(self, method, path, body, deadline_s, limit=0):
        self.request, self.limit = body, limit
        one = reply(chosen(5) if body.get("return_routed_experts") else None)
        return b"[" + one + b"," + one + b"]" if isinstance(body["sampling_params"], list) else one


def test_experts_are_in_the_request_and_in_the_size_of_the_reply_where_they_are_wanted():
    client, sampling = Noted("http://nowhere", "policy-0", None, 1.0), {"temperature": 1.0, "max_new_tokens": 2}
    limits = []
    for routing in (None, ROUTING):
        found = [
            asyncio.run(client.generate([1, 2, 3, 4], seed=1, routing=routing, **sampling)),
            *asyncio.run(client.generate_all([[1, 2, 3, 4]] * 2, [1, 2], routing=routing, **sampling)),
        ]
        assert ("return_routed_experts" in client.request) == (routing is not None)
        assert [each.routed_experts is None for each in found] == [routing is None] * 3
        limits.append(client.limit)
    assert limits[1] - limits[0] == 2 * sent_bytes(6, ROUTING)


def test_layers_without_experts_have_any_ids():
    routing = Routing(layers=3, top_k=2, experts=7, dense_layers=1)
    experts = chosen(5)
    experts[:, 0] = 0
    assert np.array_equal(read_routed_experts(experts.tobytes(), 6, routing), experts)
    experts[3, 1] = 5
    with pytest.raises(ValueError, match="the same expert twice"):
        read_routed_experts(experts.tobytes(), 6, routing)


def test_an_aborted_request_needs_none():
    assert read_generation(reply(None, "abort"), ExpectedReply(routing=ROUTING)).routed_experts is None
