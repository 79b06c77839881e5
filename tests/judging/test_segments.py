"""Segments on a word-level tokenizer, on byte-level BPE, and on one whose tokens are simply put together."""

import json
from itertools import accumulate
from pathlib import Path
from random import Random

import pytest
from helpers.tiny_models import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from exprl_megatron.config.segments import SegmentsConfig
from exprl_megatron.judging.segments import shown_texts, split_segments
from exprl_megatron.judging.token_text import TokenText

VECTORS = json.loads((Path(__file__).parents[1] / "data" / "exprl_vectors.json").read_text())["segment_split"]["cases"]
WORDS = ("<pad>", "<eos>", "###", "s1", "s2", "7", "12", "36", "+", "*", "=", "5", "3", "ans")
TRACE = "### s1 7 + 5 = 12 ### s2 12 * 3 = 36 ### ans 36"
MANY_SCRIPTS = (
    "### Step 1\nLet 東京 be a city; πr² = 3.14. Größe naïve Ωμέγα 🙂🙃 строка.\n\n### Step 2\nSo x = 5! "
    "步骤一：求和。步骤二：相乘。答案是四十二。 Done? Yes.\n\n\nTherefore ∑ is 12.\n#### Note\n### End"
)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Decodes to its words with a space between."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def unicode_tokenizer(merges: int = 60) -> PreTrainedTokenizerFast:
    """Byte-level BPE over all bytes with few merges: most characters beyond ASCII are spread over several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=257 + merges,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([MANY_SCRIPTS * 3], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def fused(tokens: list[str]) -> tuple[list[int], PreTrainedTokenizerFast]:
    """Ids of `tokens`, and a tokenizer that decodes them by putting them together."""
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(["?", *tokens]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.decoder = decoders.Fuse()
    return [vocabulary[token] for token in tokens], PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def settings(splitter: str, min_tokens: int = 0, **changes) -> SegmentsConfig:
    return SegmentsConfig(splitter=splitter, min_tokens=min_tokens, **changes)


def texts_of(tokens: list[str], config: SegmentsConfig) -> list[str]:
    ids, tokenizer = fused(tokens)
    spans = split_segments(ids, tokenizer, config)
    assert ["".join(tokens[start:end]) for start, end in spans] == list(shown_texts(ids, spans, tokenizer, "segment"))
    return ["".join(tokens[start:end]) for start, end in spans]


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: "".join(case["tokens"]))
def test_released_splitter_reproduces_the_released_segments(case):
    ids, tokenizer = fused(case["tokens"])
    spans = split_segments(ids, tokenizer, settings("released", min_tokens=32, max_segments=1))
    found = [number for number, (start, end) in enumerate(spans, 1) for _ in range(start, end)]
    assert found == case["segment_ids"]
    assert len(spans) == case["num_segments"]


def test_released_splitter_makes_no_segment_of_the_end_of_sequence():
    tokenizer = word_tokenizer()
    ids = tokenizer("7 ### <eos>")["input_ids"]
    assert split_segments(ids, tokenizer, settings("released")) == ((0, 2), (2, 3))
    assert split_segments(ids[:2], tokenizer, settings("released")) == ((0, 2),)


def test_released_splitter_finds_a_delimiter_spread_over_tokens():
    assert texts_of(["a", "#", "##", "b"], settings("released")) == ["a###", "b"]


def test_delimiter_opens_its_segment_in_a_line_of_words():
    tokenizer = word_tokenizer()
    ids = [*tokenizer(TRACE)["input_ids"], tokenizer.eos_token_id]
    spans = split_segments(ids, tokenizer, settings("delimiter"))
    assert spans == ((0, 7), (7, 14), (14, 18))
    assert shown_texts(ids, spans, tokenizer, "segment") == ("### s1 7 + 5 = 12", " ### s2 12 * 3 = 36", " ### ans 36")
    prefixes = shown_texts(ids, spans, tokenizer, "prefix")
    assert prefixes == tuple(tokenizer.decode(ids[:end], skip_special_tokens=True) for _, end in spans)
    assert shown_texts(ids, spans, tokenizer, "trace") == (TRACE,)


def test_heading_opens_a_segment_only_at_the_start_of_a_line():
    tokens = ["Plan", "\n", "###", " One", " a ### b", "\n\n", "### Two", "\n#### Three", " c"]
    assert texts_of(tokens, settings("heading")) == ["Plan\n", "### One a ### b\n\n", "### Two", "\n#### Three c"]


def test_a_token_that_straddles_a_boundary_belongs_to_the_segment_that_it_opens():
    assert texts_of(["a", ".\n\n###", " B"], settings("heading")) == ["a", ".\n\n### B"]
    assert texts_of(["a", "b ### c ### d", "e"], settings("delimiter")) == ["a", "b ### c ### de"]


def test_a_delimiter_spread_over_tokens_opens_a_segment_at_its_first_token():
    assert texts_of(["a\n", "#", "#", "#", " B"], settings("heading")) == ["a\n", "### B"]


def test_a_delimiter_after_a_delimiter_opens_nothing():
    assert texts_of(["a", "###", "###", "#", "b"], settings("delimiter")) == ["a", "#######b"]


def test_paragraphs_and_blocks_of_sentences():
    tokens = ["One", ".", "\n \n\n", "Two", ".", "\n", "Still", " two", ".\n\n", "Three", "\n\n"]
    assert texts_of(tokens, settings("paragraph")) == ["One.\n \n\n", "Two.\nStill two.\n\n", "Three\n\n"]
    tokens = ["I", " am", ".", " He", " is", " 3.5", " m", "!", " (", "No", ".)", " So", " x", "?"]
    by_two = settings("sentences", sentences_per_segment=2)
    assert texts_of(tokens, by_two) == ["I am. He is 3.5 m!", " (No.) So x?"]
    assert texts_of(["一。", "二！", "三。"], by_two) == ["一。二！", "三。"]


def test_blank_beginnings_are_not_a_segment():
    assert texts_of(["\n\n", "### A", "\n", "### B"], settings("heading")) == ["\n\n### A\n", "### B"]
    assert texts_of(["\n\n", "\n\n"], settings("paragraph")) == ["\n\n\n\n"]


def test_short_segments_are_joined_to_the_next_and_the_last_to_the_one_before():
    tokens = ["### A\n", "### B\n", "b", "b", "### C\n", "c", "c", "### D"]
    assert texts_of(tokens, settings("delimiter", min_tokens=3)) == ["### A\n### B\nbb", "### C\ncc### D"]
    assert texts_of(tokens, settings("delimiter", min_tokens=99)) == ["".join(tokens)]


def test_surplus_segments_are_joined_to_the_last():
    tokens = ["### A", "### B", "### C", "### D"]
    assert texts_of(tokens, settings("delimiter", max_segments=2)) == ["### A", "### B### C### D"]
    assert texts_of(tokens, settings("delimiter", max_segments=1)) == ["".join(tokens)]


def test_a_response_without_tokens_has_no_segments():
    tokenizer = word_tokenizer()
    assert split_segments((), tokenizer, settings("heading")) == ()
    assert shown_texts((), (), tokenizer, "prefix") == ()


def test_characters_spread_over_tokens_are_found_where_they_begin():
    tokenizer = unicode_tokenizer(merges=0)
    text = "a步b\n步骤c"
    ids = tokenizer(text)["input_ids"]
    decoded = TokenText(ids, tokenizer)
    starts = list(accumulate(len(character.encode()) for character in text))
    assert [decoded.token_at(i) for i in range(len(text))] == [0, *starts[:-1]]
    assert [decoded.characters_before(i) for i in range(5)] == [0, 1, 1, 1, 2]
    spans = split_segments(ids, tokenizer, settings("heading", delimiter="步"))
    assert shown_texts(ids, spans, tokenizer, "segment") == ("a步b\n", "步骤c")


def test_texts_of_a_real_text_are_cut_at_its_headings():
    for tokenizer in (unicode_tokenizer(0), unicode_tokenizer(60), unicode_tokenizer(400)):
        ids = tokenizer(MANY_SCRIPTS)["input_ids"]
        spans = split_segments(ids, tokenizer, settings("delimiter"))
        texts = shown_texts(ids, spans, tokenizer, "segment")
        assert [text.strip("\n ")[:8] for text in texts] == ["### Step", "### Step", "#### Not", "### End"]


@pytest.mark.parametrize("splitter", ["heading", "delimiter", "paragraph", "sentences", "released"])
def test_random_tokens_are_covered_once_and_their_texts_are_the_decoded_response(splitter):
    tokenizers = [word_tokenizer(), tiny_tokenizer(150), unicode_tokenizer(0), unicode_tokenizer(200)]
    random = Random(splitter)
    for round_number in range(200):
        tokenizer = tokenizers[round_number % len(tokenizers)]
        marks = [tokenizer(mark)["input_ids"] for mark in ("###", "\n\n### Step", ". So", "步骤🙂")]
        ids = [random.randrange(len(tokenizer))]
        for _ in range(random.choice([0, 3, 40, 400])):
            ids += random.choice(marks) if random.random() < 0.2 else [random.randrange(len(tokenizer))]
        config = SegmentsConfig(
            splitter=splitter,
            sentences_per_segment=random.choice([1, 4]),
            min_tokens=random.choice([0, 1, 5, 32]),
            max_segments=random.choice([None, 1, 3, 10]),
        )
        spans = split_segments(ids, tokenizer, config)
        assert [token for start, end in spans for token in range(start, end)] == list(range(len(ids)))
        assert all(start < end for start, end in spans)
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        assert "".join(shown_texts(ids, spans, tokenizer, "segment")) == whole
        prefixes = shown_texts(ids, spans, tokenizer, "prefix")
        assert prefixes[-1] == whole
        assert len(spans) <= config.max_count(len(ids))
        if splitter != "released":
            assert config.max_segments is None or len(spans) <= config.max_segments
            assert len(spans) == 1 or all(end - start >= config.min_tokens for start, end in spans)


def test_places_in_long_responses_are_those_of_whole_decoding():
    """An independent reading: a prefix's text is what its tokens decode to, but for a character that is cut."""
    random = Random(1)
    for tokenizer in (tiny_tokenizer(150), unicode_tokenizer(200), word_tokenizer()):
        ids = tokenizer(MANY_SCRIPTS * 8 if tokenizer.eos_token != "<eos>" else TRACE * 20)["input_ids"]
        text = TokenText(ids, tokenizer)
        for token in random.sample(range(len(ids)), min(200, len(ids))):
            prefix = tokenizer.decode(ids[:token], skip_special_tokens=True)
            assert text.text[: text.characters_before(token)] == prefix.rstrip("\ufffd")


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer):
        self._tokenizer, self.decoded = tokenizer, 0

    def decode(self, ids, **options):
        self.decoded += len(ids)
        return self._tokenizer.decode(ids, **options)


@pytest.mark.parametrize("splitter", ["heading", "paragraph", "released"])
@pytest.mark.parametrize("text", [MANY_SCRIPTS, "plain words go on and on "])
def test_work_grows_with_the_length_and_not_with_its_square(splitter, text):
    tokenizer = unicode_tokenizer(200)
    line = tokenizer(text)["input_ids"]
    work = []
    for tokens in (4000, 16000):
        ids = (line * (tokens // len(line) + 1))[:tokens]
        counting = Counting(tokenizer)
        spans = split_segments(ids, counting, settings(splitter))
        shown_texts(ids, spans, counting, "prefix")
        work.append(counting.decoded)
    assert work[1] < 4.5 * work[0]
