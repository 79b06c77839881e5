"""The experts of a reply; tests/serving/test_real_servers.py compares those of a real server with transformers'."""

import asyncio
import base64
import json
import sys
from importlib.metadata import distributions
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from exprl_megatron.models.routing import Routing
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.generation import ExpectedReply, read_generation
from exprl_megatron.serving.routed_experts import read_routed_experts, sent_bytes
from exprl_megatron.serving.server_command import PLUGINS

ROUTING = Routing(layers=3, top_k=2, experts=7)
TOKENS = 6


@pytest.fixture
def plugin(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(PLUGINS)])
    import exprl_compact_experts

    return exprl_compact_experts


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


def _compact(experts: np.ndarray, dtype: type = np.uint8) -> np.ndarray:
    """As the plugin sends them."""
    return np.frombuffer(experts.astype(dtype).tobytes() + bytes([np.dtype(dtype).itemsize]), np.uint8)


def _changed(place: tuple[int, ...], value: int) -> np.ndarray:
    experts = chosen(5)
    experts[place] = value
    return experts


@pytest.mark.parametrize(("experts", "dtype"), [(7, np.uint8), (256, np.uint8), (257, np.int16), (600, np.int16)])
def test_a_server_with_the_plugin_sends_ids_of_one_or_two_bytes_and_they_are_read_as_sglang_s_own(
    plugin, experts, dtype
):
    routing = Routing(layers=3, top_k=2, experts=experts)
    ids = chosen(5, routing)
    ids[0, 0] = experts - 1, 0
    sent = plugin.compact(torch.from_numpy(ids)).numpy()
    assert sent.tobytes() == _compact(ids, dtype).tobytes()
    expected = read_routed_experts(ids.tobytes(), 6, routing)
    found = read_routed_experts(sent.tobytes(), 6, routing)
    assert np.array_equal(found, expected) and found.dtype == expected.dtype == routing.dtype


def test_ids_of_few_experts_are_read_whatever_size_a_reply_has_for_them():
    """A reply of a model with more than 256 experts in which no larger id is."""
    routing = Routing(layers=3, top_k=2, experts=300)
    ids = chosen(5)
    for sent in (ids, _compact(ids), _compact(ids, np.int16)):
        found = read_routed_experts(sent.tobytes(), 6, routing)
        assert np.array_equal(found, ids) and found.dtype == np.int16


def test_what_fits_into_no_two_bytes_is_sent_as_it_is(plugin):
    for value in (-1, 2**15):
        ids = torch.tensor([[[0, value]]], dtype=torch.int32)
        assert plugin.compact(ids) is ids
    assert plugin.compact(torch.empty(0, 3, 2, dtype=torch.int32)).tolist() == [1]


def test_before_the_detokenizer_encodes_a_batch_its_ids_are_made_compact(plugin, monkeypatch):
    """And nothing else of the batch is changed."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    registered = []
    monkeypatch.setattr(HookRegistry, "register", lambda *hook: registered.append(hook))
    plugin.activate()
    ((target, hook, kind),) = registered
    assert target.endswith(".DetokenizerManager.handle_batch_token_id_out") and kind.value == "before"
    ids = torch.from_numpy(chosen(5))
    batch = SimpleNamespace(routed_experts=[None, ids], indexer_topk=[ids, None])
    assert hook(None, batch) is None
    none, found = batch.routed_experts
    # SGLang encodes what it finds here: item.numpy().tobytes().
    assert none is None and found.numpy().tobytes() == _compact(chosen(5)).tobytes()
    assert batch.indexer_topk[0] is ids
    nothing = SimpleNamespace(routed_experts=None)
    hook(None, nothing)
    assert nothing.routed_experts is None


def test_sglang_finds_the_plugin_where_servers_look(plugin):
    entries = [entry for found in distributions(path=[str(PLUGINS)]) for entry in found.entry_points]
    assert plugin.activate in [entry.load() for entry in entries if entry.group == "sglang.srt.plugins"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b'"AAA*"', "routed_experts is not base64"),
        (b'"AAA"', "routed_experts is not base64"),
        (b'"AAAA', "routed_experts is not"),
        (b'"AAAA","routed_experts":"AAAA"', "routed_experts is there more than once"),
        (b"[1,2]", "routed_experts"),
        (b"7", "routed_experts"),
        (b"null", "routed_experts is missing"),
        (b' "\\u0041AAA"', "routed_experts is not base64"),
    ],
)
def test_a_value_that_is_not_base64_is_refused_by_the_field_s_name(value, message):
    whole = reply(chosen(5))
    start = whole.index(b'"routed_experts":') + len(b'"routed_experts":')
    end = whole.index(b'"', whole.index(b'"', start) + 1) + 1
    body = whole[:start] + value + whole[end:]
    with pytest.raises(ValueError, match=message):
        read_generation(body, ExpectedReply(routing=ROUTING))


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (None, "routed_experts is missing; a server returns it with --enable-return-routed-experts"),
        (chosen(4), "routed_experts has 96 bytes, 24 ids of int32, but 5 tokens have 2 experts in each of 3 layers"),
        (chosen(6), "routed_experts has 144 bytes, 36 ids of int32, but 5 tokens have"),
        (chosen(5).astype(np.uint8), "ids of .*, but 5 tokens have 2 experts in each of 3 layers"),
        (chosen(5).astype(np.int64), "routed_experts has 240 bytes, 60 ids of int32, but 5 tokens have"),
        (_compact(chosen(4)), "routed_experts has 24 bytes, 24 ids of uint8, but 5 tokens have"),
        (_compact(chosen(5), np.int16)[:-2], "ids of .*, but 5 tokens have 2 experts in each of 3 layers"),
        (_compact(_changed((4, 2, 1), 7)), "an id that is none of the 7 experts'"),
        (_compact(_changed((2, 1), 3)), "the same expert twice for a token"),
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
