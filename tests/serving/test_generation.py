"""Replies of /generate, from bytes to arrays; the expectation is what the json module reads of the same bytes."""

import json
import math
import random

import numpy as np
import pytest
from helpers.operations import instructions

from exprl_megatron.serving.generation import ExpectedReply, read_generation, read_scores

COMPACT = {"separators": (",", ":")}


def reply(tokens: int, seed: int = 0, **changes) -> dict:
    """As SGLang writes it; log-probs are float32 values, ids go to the end of large vocabularies."""
    draw = random.Random(seed)
    ids = [draw.choice((draw.randrange(10), draw.randrange(262_144))) for _ in range(tokens)]
    log_probs = [float(np.float32(-draw.choice((0.0, draw.expovariate(1), draw.expovariate(1e6))))) for _ in ids]
    meta = {
        "id": "0f",
        "finish_reason": {"type": "stop", "matched": 2},
        "prompt_tokens": 7,
        "output_token_logprobs": [[log_prob, token, None] for log_prob, token in zip(log_probs, ids, strict=True)],
        "cached_tokens": 5,
        "weight_versions": [{"version": "v3", "start": 0, "end": tokens}],
    }
    return {"text": 'said "output_token_logprobs":[[1,2,null]] [ü]', "output_ids": ids, "meta_info": meta | changes}


def encoded(record: dict, **style) -> bytes:
    return json.dumps(record, **(style or COMPACT)).encode()


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 1000])
@pytest.mark.parametrize("style", [COMPACT, {"indent": 1}, {"separators": (", ", ": "), "ensure_ascii": False}])
def test_a_generation_is_what_the_json_says_bit_for_bit(tokens, style):
    body = encoded(reply(tokens), **style)
    found, expected = read_generation(body), json.loads(body)
    log_probs = [entry[0] for entry in expected["meta_info"]["output_token_logprobs"]]
    assert found.token_ids.tolist() == expected["output_ids"] and found.token_ids.dtype == np.int32
    assert found.log_probs.tobytes() == np.array(log_probs, np.float32).tobytes()
    assert (found.text, found.finish_reason) == (expected["text"], "stop")
    assert (found.prompt_tokens, found.cached_tokens) == (7, 5)
    assert found.weight_versions == (("v3", 0, tokens),)


def test_log_probs_of_watched_ids_are_read_where_they_were_asked():
    watched = [[[-0.5, 7, None], [-1.5, 9, "x"]], [[-2.0, 7, None], [-0.25, 9, None]]]
    found = read_generation(encoded(reply(2, output_token_ids_logprobs=watched)), ExpectedReply(watched_ids=(7, 9)))
    assert found.watched_log_probs == ((-0.5, -1.5), (-2.0, -0.25))
    assert read_generation(encoded(reply(2))).watched_log_probs == ()


def test_an_aborted_request_that_was_still_waiting_has_no_tokens():
    record = reply(0) | {"meta_info": {"finish_reason": {"type": "abort"}, "id": "0f"}}
    found = read_generation(encoded(record))
    assert (found.finish_reason, len(found.token_ids), found.weight_versions) == ("abort", 0, ())


def broken(change) -> bytes:
    record = reply(3)
    change(record, record["meta_info"])
    return encoded(record)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r, m: m["output_token_logprobs"].pop(), "3 output_ids but 2 output_token_logprobs"),
        (lambda r, m: r["output_ids"].append(1), "4 output_ids but 3 output_token_logprobs"),
        (lambda r, m: m["output_token_logprobs"][1].__setitem__(0, math.nan), "output_token_logprobs .* not finite"),
        (lambda r, m: m["output_token_logprobs"][1].__setitem__(0, -math.inf), "output_token_logprobs"),
        (lambda r, m: m["output_token_logprobs"][1].__setitem__(0, None), "output_token_logprobs: Failed to parse"),
        (lambda r, m: m["output_token_logprobs"][1].__setitem__(0, "x"), "output_token_logprobs"),
        (lambda r, m: m["output_token_logprobs"][1].append(None), r"output_token_logprobs is not a list of \[log-prob"),
        (lambda r, m: m["output_token_logprobs"][1].pop(), r"output_token_logprobs is not a list of \[log-prob"),
        (lambda r, m: m.pop("output_token_logprobs"), "output_token_logprobs"),
        (lambda r, m: m.update(output_token_logprobs=None), "output_token_logprobs"),
        (lambda r, m: m.pop("weight_versions"), "weight_versions is missing"),
        (lambda r, m: r["output_ids"].__setitem__(0, 2**40), "output_ids has an entry that is not an id"),
        (lambda r, m: r["output_ids"].__setitem__(0, 2**80), "output_ids has an entry that is not an id"),
        (lambda r, m: r["output_ids"].__setitem__(0, -1), "output_ids has an entry that is not an id"),
        (lambda r, m: r["output_ids"].__setitem__(0, 1.5), "output_ids has an entry that is not an id"),
        (lambda r, m: r["output_ids"].__setitem__(2, None), "output_ids has an entry that is not an id"),
        (lambda r, m: r["output_ids"].__setitem__(2, "7"), "output_ids has an entry that is not an id"),
        (lambda r, m: r["output_ids"].__setitem__(2, [7]), "output_ids has an entry that is not an id"),
        (lambda r, m: r["output_ids"].__setitem__(2, True), "output_ids has an entry that is not an id"),
        (lambda r, m: r["output_ids"].__setitem__(0, [[7], "7"]), "JSON|output_ids"),
        (lambda r, m: m.update(output_ids=r.pop("output_ids")), "output_ids"),
        (lambda r, m: m.update(output_ids=r["output_ids"]), '"output_ids" is there 2 times'),
        (lambda r, m: r.update(output_ids=None), "output_ids is not a list"),
        (lambda r, m: r.update(output_ids={"a": 1}), "output_ids is not a list"),
        (lambda r, m: r.pop("text"), "text"),
        (lambda r, m: m.update(prompt_tokens="7"), r"\$\.meta_info\.prompt_tokens"),
    ],
)
def test_a_reply_in_another_form_is_refused_and_the_field_named(change, message):
    with pytest.raises(ValueError, match=message):
        read_generation(broken(change))


@pytest.mark.parametrize("ids", [b"[1,,3]", b"[,1,2]", b"[0x1,2,3]", b"[1,2,3,]", b"[1,2,3]]", b"[+1,2,3]", b"[1;2;3]"])
def test_ids_that_are_not_json_are_refused(ids):
    body = encoded(reply(3))
    place = body.index(b'"output_ids":') + len(b'"output_ids":')
    end = body.index(b"]", place) + 1
    with pytest.raises(ValueError, match=r"output_ids|JSON"):
        read_generation(body[:place] + ids + body[end:])


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b"Not Found", b'{"text":"a"', b'"output_token_logprobs":]'])
def test_what_is_not_a_reply_at_all_is_refused(body):
    with pytest.raises(ValueError, match=r"JSON|truncated|Expected|list"):
        read_generation(body)


def test_scores_leave_out_the_token_before_and_are_of_the_tokens_asked_for():
    entries = [[None, 4, None], [-0.5, 5, None], [-1.25, 6, None]]
    body = encoded({"text": "", "meta_info": reply(0, input_token_logprobs=entries, weight_version="v1")["meta_info"]})
    found = read_scores(body, [5, 6])
    assert (found.log_probs.tolist(), found.weight_version) == ([-0.5, -1.25], "v1")
    with pytest.raises(ValueError, match="input_token_logprobs of 2 tokens that are not the 1 asked for"):
        read_scores(body, [5])
    with pytest.raises(ValueError, match="not the 2 asked for"):
        read_scores(body, [5, 7])


@pytest.mark.parametrize("tokens", [3, 3000])
@pytest.mark.parametrize("entry", [-1, 1.0, 2**31, 2**40, True, None, "7", [7], "1e3"])
def test_an_entry_that_is_not_an_id_is_refused_in_short_and_in_long_lists(tokens, entry):
    record = reply(tokens)
    record["output_ids"][1] = entry
    with pytest.raises(ValueError, match=r"output_ids (has an entry that is not an id|is not a list)"):
        read_generation(encoded(record))


def test_reading_costs_nothing_for_each_token():
    cost = [instructions(lambda body=body: read_generation(body)) for body in map(encoded, (reply(1500), reply(6000)))]
    assert cost[1] <= 1.1 * cost[0]
