"""Only tokenizers that tokenize each word for itself are proven to do so; their words' tokens are those of texts."""

import pytest
from helpers.tokenizer_rules import CUTTABLE, PROVEN, TEXT, UNCUTTABLE, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from exprl_megatron.judging import word_tokens
from exprl_megatron.judging.token_splits import LETTERS, PRINTABLE, always_splits
from exprl_megatron.judging.word_tokens import WordTokens, separator_of

BLANKS = (" ", " ", "  ", "\n", "\t", "\u00a0", "\u0301")
ALPHABET = st.sampled_from([*"aZé東'9.=<|\\", *BLANKS, "<think>", "<|im_start|>", "<|im_end|>", "'s"])
TEXTS = st.lists(st.lists(st.one_of(ALPHABET, st.sampled_from(TEXT.split()))).map("".join), max_size=4)


def backend_of(name="qwen", pattern=None, behavior="isolated", invert=False):
    """A copy of the rules of that family, with another pattern."""
    backend = Tokenizer.from_str(tokenizer_of(name, phrase=False).backend_tokenizer.to_str())
    if pattern is not None:
        split = pre_tokenizers.Split(Regex(pattern), behavior, invert)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return backend


def proven(backend):
    return always_splits(backend, PRINTABLE, " "), always_splits(backend, LETTERS, "\n")


@pytest.mark.parametrize("name", PROVEN)
def test_real_families_are_proven(name):
    assert proven(backend_of(name)) == (True, True)


@pytest.mark.parametrize("name", [*UNCUTTABLE, *sorted(set(CUTTABLE) - set(PROVEN))])
def test_what_looks_around_or_has_no_words_is_not_proven(name):
    assert proven(backend_of(name)) == (False, False)


def words_of(backend, separator):
    def encode(texts):
        return [each.ids for each in backend.encode_batch_fast(texts, add_special_tokens=False)]

    return WordTokens(encode, separator)


@pytest.mark.parametrize("name", PROVEN)
@pytest.mark.parametrize("separated", [True, False])
def test_words_put_together_have_the_tokens_of_the_text(name, separated, monkeypatch):
    backend = backend_of(name)
    monkeypatch.setattr(word_tokens, "_MOST_KEPT", 40)
    words = words_of(backend, separator_of(backend) if separated else None)

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(TEXTS)
    def check(texts):
        wholes = [backend.encode(text, add_special_tokens=False).ids for text in texts]
        parts = words.parts(texts)
        assert [part.json for part in parts] == [",".join(map(str, ids)).encode() for ids in wholes]
        assert [part.count for part in parts] == list(map(len, wholes))
        assert len(words._known) <= 40

    check()


def test_words_between_separators_that_are_lost_or_have_no_tokens_are_tokenized_alone():
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "<s>": 2, " ": 3, "#": 4}, []))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\p{L}+|\S|\s"), "isolated")
    backend.add_special_tokens(["<s>"])
    assert separator_of(backend) == ("<s>", 2)
    texts = ["a ü b", "", "ü", "a <s>b a", "# a#", "é"]
    for separator in (("<s>", 2), ("#", 3), ("ü", 7), None):
        found = [part.json for part in words_of(backend, separator).parts(texts)]
        assert found == [",".join(map(str, backend.encode(text).ids)).encode() for text in texts]


def test_special_tokens_that_are_plain_text_separate_nothing():
    backend = backend_of()
    assert separator_of(backend) == ("<|im_start|>", 0)
    backend.encode_special_tokens = True
    assert separator_of(backend) is None


@pytest.mark.parametrize(
    "pattern",
    [
        *(r"\p{L}+ ?|\S|\s", r"\p{L}+ \p{L}+|\S|\s", r"(?:\p{L} ?)+|\S|\s", r"(?:a| )+|\S|\s", r"[^\n]+|\n"),
        *(r"\p{N}+", r"\p{L}+(?= )|\S|\s", r"\p{L}+\b|\S|\s", r"(?<=e) |\S|\s", r"(?<! )\p{L}+|\S|\s", r".|\n"),
        *(r"(?i:X )|\S|\s", r"\S*(?: \S+)?|\s", r"[a-z ]{2}|\S|\s", r"\p{L}+(?!x)|\S|\s", r"^\p{L}+|\S|\s"),
        *(r"[[:alpha:] ]+|\S|\s", r"a(?>b )|\S|\s", r"(a)\1|\S|\s", r"x(?:y|z)* |\S|\s", r"\w+\W|\s", r"a\x20|\S|\s"),
        *(r"[a-z&&[^ ]]+|\S|\s", r"a{,2} |\S|\s", r"(?#a)b|\S|\s", r"(|a) b|\S|\s", r"(?m:a.b)|\S|\s"),
    ],
)
def test_a_pattern_that_may_join_words_is_not_proven(pattern):
    assert not always_splits(backend_of(pattern=pattern), PRINTABLE, " ")


def test_the_rules_themselves_are_proven_with_signs_that_say_how_to_search():
    assert proven(backend_of(pattern=r"[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s+?")) == (
        True,
        True,
    )


def test_a_line_end_that_belongs_to_the_word_before_it_is_not_a_cut():
    backend = backend_of(pattern=r"\p{L}+\n?|[^\s\p{L}]| ?\p{L}|\s")
    assert not always_splits(backend, LETTERS, "\n")


@pytest.mark.parametrize("behavior", ["merged_with_next", "merged_with_previous", "contiguous", "removed"])
def test_pre_tokens_that_are_joined_or_lost_are_not_proven(behavior):
    assert not any(proven(backend_of(pattern=r"\p{L}+|\S|\s", behavior=behavior)))


def test_what_is_between_the_pre_tokens_may_be_lost_where_there_is_nothing():
    assert proven(backend_of(pattern=r" ?\p{L}+|\S|\s", behavior="removed", invert=True)) == (True, True)
    assert not any(proven(backend_of(pattern=r"\p{L}+", behavior="removed", invert=True)))


@pytest.mark.parametrize(
    "token",
    [
        AddedToken("of the", normalized=False),
        AddedToken("<x>", rstrip=True),
        AddedToken(" x", single_word=True),
        AddedToken("a\u00a0b", normalized=True),
    ],
)
def test_an_added_token_that_reaches_across_a_space_is_not_proven(token):
    backend = backend_of()
    backend.normalizer = normalizers.NFKC()
    assert always_splits(backend, PRINTABLE, " ")
    backend.add_tokens([token])
    assert not always_splits(backend, PRINTABLE, " ")


def test_other_characters_before_the_pattern_are_not_proven():
    backend = backend_of()
    backend.normalizer = normalizers.Lowercase()
    assert not any(proven(backend))
    backend = backend_of()
    parts = [pre_tokenizers.ByteLevel(False, use_regex=False), pre_tokenizers.Split(Regex(r"\S|\s"), "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    assert not any(proven(backend))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert not any(proven(backend))
