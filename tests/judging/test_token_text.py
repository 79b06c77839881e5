"""Two ways to tell which token holds which character: by the bytes of tokens, and by decoding."""

import numpy as np
import pytest
from helpers.tokenizer_rules import tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_segments import MANY_SCRIPTS, word_tokenizer

from exprl_megatron.config.segments import SegmentsConfig
from exprl_megatron.judging import token_text
from exprl_megatron.judging.segments import segments_and_texts, shown_texts, split_segments
from exprl_megatron.judging.token_text import TokenText
from exprl_megatron.utils.token_spelling import spelling_of


@pytest.mark.parametrize("name", ["gpt2", "qwen", "deepseek"])
def test_places_by_bytes_are_those_by_decoding(name, monkeypatch):
    tokenizer = tokenizer_of(name)
    bytes_alone = [token for token, text in enumerate(spelling_of(tokenizer).tokens) if len(text) == 1]
    parts = [
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (MANY_SCRIPTS, "步骤🙂", "é so ", "<think>")
    ]
    parts += [[tokenizer.eos_token_id], [tokenizer.convert_tokens_to_ids("of the")]]
    tokens = st.one_of(st.sampled_from(parts), st.sampled_from(bytes_alone).map(lambda token: [token]))

    @settings(max_examples=10, deadline=None, derandomize=True)
    @given(st.lists(tokens, max_size=6))
    def check(chosen):
        ids = [token for part in chosen for token in part]
        by_bytes = TokenText(np.array(ids, np.int32), tokenizer)
        by_decoding = token_text._StretchPlaces(ids, tokenizer)
        assert by_bytes.text == by_decoding.text == tokenizer.decode(ids, skip_special_tokens=True)
        assert [by_bytes.characters_before(n) for n in range(len(ids) + 2)] == [
            by_decoding.characters_before(n) for n in range(len(ids) + 2)
        ]
        places = range(1, len(by_bytes.text))
        assert [by_bytes.token_at(n) for n in places] == [by_decoding.token_at(n) for n in places]

    check()


class Counting:
    """Counts the tokens that a tokenizer decodes."""

    def __init__(self, tokenizer):
        self._tokenizer, self.decoded = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __len__(self):
        return len(self._tokenizer)

    def decode(self, ids, **options):
        self.decoded += len(ids)
        return self._tokenizer.decode(ids, **options)


def test_segments_and_texts_are_the_same_from_one_decoding():
    tokenizer = word_tokenizer()
    ids = tokenizer("### s1 7 " + "12 + " * 200 + "### ans 36")["input_ids"]
    config = SegmentsConfig(splitter="delimiter", min_tokens=0)
    apart, once = Counting(tokenizer), Counting(tokenizer)
    spans = split_segments(ids, apart, config)
    texts = shown_texts(ids, spans, apart, "prefix")
    assert len(spans) == 2
    assert segments_and_texts(np.array(ids, np.int32), once, config, "prefix") == (spans, texts)
    assert once.decoded < 0.7 * apart.decoded


def test_a_byte_level_response_is_not_decoded_token_by_token():
    tokenizer = Counting(tokenizer_of("qwen"))
    ids = tokenizer_of("qwen")(MANY_SCRIPTS * 20, add_special_tokens=False)["input_ids"]
    segments_and_texts(ids, tokenizer, SegmentsConfig(), "prefix")  # its vocabulary is spelled now
    decoded = tokenizer.decoded
    segments_and_texts(ids, tokenizer, SegmentsConfig(), "prefix")
    assert tokenizer.decoded == decoded
