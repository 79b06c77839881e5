"""Token ids in parts, and as they are written into a request."""

import json

import msgspec
import pytest

from exprl_megatron.serving.http_client import _json
from exprl_megatron.utils.token_ids import TokenIds, TokenPart


def test_parts_are_one_list():
    ids = TokenIds(TokenPart.of([]), TokenPart.of([1, 22]), TokenPart.of([]), TokenPart.of([333]))
    assert list(ids) == ids.tolist() == [1, 22, 333] and len(ids) == 3 and ids[-1] == 333
    assert json.loads(ids.json) == [1, 22, 333]
    assert (list(TokenIds()), TokenIds().json) == ([], b"[]")


@pytest.mark.parametrize("text", ["Score: [1-5]", "東京 \u2028 \x00", "lone \ud83d"])
def test_a_request_is_read_as_it_was_meant(text):
    body = {"input_ids": [1, 2], "params": {"regex": text, "seed": 2**31 - 1, "t": 0.1, "none": None, "yes": True}}
    assert json.loads(_json(body)) == body


def test_ids_that_are_written_already_are_put_into_the_request():
    body = {"input_ids": msgspec.Raw(TokenIds(TokenPart.of([1, 2])).json)}
    assert json.loads(_json(body)) == {"input_ids": [1, 2]}
