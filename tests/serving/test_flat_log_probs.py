"""Log-probs as arrays, as the plugin writes them; tests/serving/test_real_servers.py has replies of a real server."""

import asyncio
import base64
import json
import sys
from importlib.metadata import distributions
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.operations import instructions

from exprl_megatron.serving.flat_log_probs import FLAT_REQUESTED, IDS, LOG_PROBS
from exprl_megatron.serving.generation import ExpectedReply, read_generation
from exprl_megatron.serving.server_command import PLUGINS


@pytest.fixture
def plugin(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(PLUGINS)])
    import exprl_flat_log_probs

    return exprl_flat_log_probs


def drawn(tokens: int) -> tuple[list[float], list[int]]:
    """Log-probs, float32 values from -1e-6 to -50 and 0, and ids."""
    draw = np.random.default_rng(tokens)
    log_probs = -(draw.exponential(1, tokens) * 10 ** draw.uniform(-6, 1, tokens)).astype(np.float32)
    return np.where(draw.random(tokens) < 0.1, 0, log_probs).tolist(), draw.integers(0, 2**31, tokens).tolist()


def encoded(meta: dict, output_ids: list[int], text: str = 'said "output_token_logprobs":[] [ü]') -> bytes:
    shared = {
        "finish_reason": {"type": "stop"},
        "weight_versions": [{"version": "v1", "start": 0, "end": 0}],
        "cached_tokens": 5,
    }
    record = {"text": text, "output_ids": output_ids, "meta_info": shared | meta}
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode()


def written(plugin, tokens: int, **changes) -> dict:
    """The `meta_info` of a server with the plugin."""
    spans = [{"version": "v1", "start": 0, "end": tokens}]
    return {"output_token_logprobs": [], "weight_versions": spans} | plugin.flat(*drawn(tokens)) | changes


@pytest.mark.parametrize("tokens", [0, 1, 7, 5000])
def test_what_the_plugin_writes_is_read_bit_for_bit(plugin, tokens):
    log_probs, ids = drawn(tokens)
    body = encoded(written(plugin, tokens), [])
    found = read_generation(body, ExpectedReply(max_new_tokens=tokens))
    assert found.token_ids.tolist() == ids and found.token_ids.dtype == np.int32
    assert found.log_probs.tobytes() == np.array(log_probs, np.float32).tobytes()
    assert (found.text, found.cached_tokens) == ('said "output_token_logprobs":[] [ü]', 5)
    assert len(body) < 400 + 11 * tokens


def test_output_ids_that_are_sent_too_must_be_the_same(plugin):
    _, ids = drawn(3)
    assert read_generation(encoded(written(plugin, 3), ids)).token_ids.tolist() == ids
    with pytest.raises(ValueError, match="output_token_logprobs has other ids than output_ids"):
        read_generation(encoded(written(plugin, 3), [*ids[:2], ids[2] - 1]))
    with pytest.raises(ValueError, match="2 output_ids but 3 output_token_logprobs"):
        read_generation(encoded(written(plugin, 3), ids[:2]))


def _sent(values: list, kind: str) -> str:
    return base64.b64encode(np.array(values, kind).tobytes()).decode()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({LOG_PROBS: None}, f"{LOG_PROBS} is missing"),
        ({IDS: None}, f"{IDS} is missing"),
        ({IDS: [1, 2, 3]}, f"{IDS} is missing"),
        ({LOG_PROBS: "AA*A"}, f"{LOG_PROBS} is not base64"),
        ({IDS: "AAA"}, f"{IDS} is not base64"),
        ({LOG_PROBS: _sent([-1.0, -1.0], "<f4")}, f"{LOG_PROBS} has 8 bytes and {IDS} 12, which must be 4 for each"),
        ({LOG_PROBS: "AAAA", IDS: "AAAA"}, "3 bytes .* must be 4 for each token"),
        ({LOG_PROBS: _sent([-1.0, np.nan, -1.0], "<f4")}, "output_token_logprobs has a log-prob that is not finite"),
        ({LOG_PROBS: _sent([-1.0, -np.inf, -1.0], "<f4")}, "output_token_logprobs has a log-prob that is not finite"),
        ({LOG_PROBS: _sent([-1.0, 0.5, -1.0], "<f4")}, "output_token_logprobs has a log-prob above 0, 0.5"),
        ({IDS: _sent([1, -2, 3], "<i4")}, "an entry that is not an id, -2"),
        ({IDS: _sent([1, 99, 3], "<i4")}, "output_ids has 99, but the vocabulary has 99 ids"),
        ({"weight_versions": [{"version": "v1", "start": 0, "end": 2}]}, "there are 3 output_ids"),
        ({"output_token_logprobs": [[-1.0, 4, None]]}, "0 output_ids but 1 output_token_logprobs"),
    ],
)
def test_damaged_arrays_are_refused_and_named(plugin, changes, message):
    meta = written(plugin, 3) | {IDS: _sent([1, 2, 3], "<i4")} | changes
    with pytest.raises(ValueError, match=message):
        read_generation(encoded(meta, []), ExpectedReply(vocabulary=99))


@pytest.mark.parametrize("name", [LOG_PROBS, IDS, "output_token_logprobs", "weight_versions"])
def test_a_field_that_is_there_twice_is_refused(plugin, name):
    meta = written(plugin, 3)
    body = encoded(meta, [])
    again = json.dumps({name: meta[name]}, separators=(",", ":")).encode()[1:-1]
    with pytest.raises(ValueError, match=f"{name}.* is there (more than once|2 times)"):
        read_generation(body.replace(b'"cached_tokens"', again + b',"cached_tokens"'))


def test_reading_costs_nothing_for_each_token(plugin):
    bodies = [encoded(written(plugin, tokens), []) for tokens in (1500, 6000)]
    cost = [instructions(lambda body=body: read_generation(body)) for body in bodies]
    assert cost[1] <= 1.1 * cost[0]


class Manager:
    """What the plugin's hooks see of SGLang's TokenizerManager."""

    def __init__(self, state):
        self.rid_to_state = {"r": state}
        self.seen: list[list[float]] = []

    def add_logprob_to_meta_info(self, meta_info, state, top_logprobs_num, token_ids_logprob, *, finished):
        self.seen.append(list(state.output_token_logprobs_val))
        meta_info["output_token_logprobs"] = list(zip(self.seen[-1], state.output_token_logprobs_idx, strict=False))

    async def _wait_one_response(self, request, http_request):
        yield {"text": "t", "output_ids": list(self.output_ids), "meta_info": self.meta_info}


def request(**changes):
    asked = {"rid": "r", "stream": False, "return_logprob": True} | FLAT_REQUESTED
    return SimpleNamespace(**asked | changes)


def hooks(plugin, monkeypatch) -> dict:
    from sglang.srt.plugins.hook_registry import HookRegistry

    registered = []
    monkeypatch.setattr(HookRegistry, "register", lambda *hook: registered.append(hook))
    plugin.activate()
    assert all(kind.value == "around" for *_, kind in registered)
    return {target.rpartition(".")[2]: hook for target, hook, _ in registered}


def replied(plugin, monkeypatch, asked, output_ids, top=0, finished=True):
    """The output for `asked` after both hooks, and what the server's own function saw of the log-probs."""
    of = hooks(plugin, monkeypatch)
    state = SimpleNamespace(obj=asked, output_token_logprobs_val=[-0.5, -0.25], output_token_logprobs_idx=[8, 9])
    manager = Manager(state)
    manager.meta_info, manager.output_ids = {}, output_ids
    writer = type(manager).add_logprob_to_meta_info
    of["add_logprob_to_meta_info"](writer, manager, manager.meta_info, state, top, None, finished=finished)
    assert state.output_token_logprobs_val == [-0.5, -0.25]

    async def last():
        sender = type(manager)._wait_one_response
        return [output async for output in of["_wait_one_response"](sender, manager, asked, None)][-1]

    return asyncio.run(last()), manager.seen


def test_a_request_for_arrays_gets_no_list(plugin, monkeypatch):
    output, seen = replied(plugin, monkeypatch, request(), [8, 9])
    assert seen == [[]] and output["output_ids"] == [] and output["meta_info"]["output_token_logprobs"] == []
    assert output["meta_info"][LOG_PROBS] == _sent([-0.5, -0.25], "<f4")
    assert output["meta_info"][IDS] == _sent([8, 9], "<i4")
    assert output["meta_info"]["output_token_logprobs_length"] == 2


def test_ids_that_are_not_those_of_the_log_probs_are_sent_too(plugin, monkeypatch):
    output, _ = replied(plugin, monkeypatch, request(), [8, 7])
    assert output["output_ids"] == [8, 7]


def test_an_unfinished_reply_has_none_yet(plugin, monkeypatch):
    output, seen = replied(plugin, monkeypatch, request(), [8, 9], finished=False)
    assert seen == [[]] and LOG_PROBS not in output["meta_info"]


@pytest.mark.parametrize(
    ("asked", "top"),
    [
        (request(return_flat_raw_output_top_logprobs=False), 0),
        (request(return_flat_raw_top_logprobs_b64=False), 0),
        (request(stream=True), 0),
        (request(), 3),
    ],
)
def test_every_other_request_is_answered_as_sglang_does(plugin, monkeypatch, asked, top):
    output, seen = replied(plugin, monkeypatch, asked, [8, 9], top)
    assert seen == [[-0.5, -0.25]] and output["output_ids"] == [8, 9]
    assert output["meta_info"] == {"output_token_logprobs": [(-0.5, 8), (-0.25, 9)]}


def test_sglang_finds_the_plugin_where_servers_look(plugin):
    entries = [entry for found in distributions(path=[str(PLUGINS)]) for entry in found.entry_points]
    assert plugin.activate in [entry.load() for entry in entries if entry.group == "sglang.srt.plugins"]
