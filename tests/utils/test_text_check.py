"""A text is that of its ids, as SGLang's detokenizer writes it; anything else is not."""

import numpy as np
import pytest
from helpers.tokenizer_rules import tokenizer_of
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from exprl_megatron.utils.text_check import text_check_of

TEXT = "Let x = 3. Then 步骤 🙂, é so it isn't 4 .\n\nScore: 5"


@pytest.fixture(scope="module", params=["gpt2", "qwen"])
def spelled(request):
    """A tokenizer, its check, and the ids of TEXT."""
    tokenizer = tokenizer_of(request.param)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    return tokenizer, text_check_of(tokenizer), ids


def array(ids):
    return np.array(ids, np.int32)


def test_the_text_of_the_ids_is_taken_with_and_without_a_stop_token(spelled):
    tokenizer, check, ids = spelled
    assert tokenizer.decode(ids) == TEXT
    check.check(array(ids), TEXT)
    check.check(array([*ids, tokenizer.eos_token_id]), TEXT)
    # SGLang leaves a stop token out that is not special, too.
    check.check(array(ids), tokenizer.decode(ids[:-1]))
    check.check(array([tokenizer.eos_token_id]), "")
    check.check(array([]), "")


def test_a_character_that_ids_only_begin_may_be_shown_or_not(spelled):
    tokenizer, check, _ = spelled
    parts = tokenizer("é so 步", add_special_tokens=False)["input_ids"]
    for end in range(1, len(parts)):
        check.check(array(parts[:end]), tokenizer.decode(parts[:end]))
        check.check(array(parts[:end]), tokenizer.decode(parts[:end]).rstrip("\ufffd"))
    # What is no text before its end is shown in one way or another.
    broken = [*parts[:-1], *ids_of(tokenizer, " so")]
    check.check(array(broken), "anything")


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_space_before_punctuation_may_be_left_out(spelled):
    _, check, ids = spelled
    check.check(array(ids), TEXT.replace(" .", "."))


def test_ids_that_the_tokenizer_does_not_know_are_not_compared(spelled):
    tokenizer, check, ids = spelled
    check.check(array([*ids, len(tokenizer)]), "anything")


@pytest.mark.parametrize(
    "other",
    [
        TEXT.replace("5", "4"),
        TEXT + "5",
        TEXT + " Score: 5",
        TEXT[::-1],
        TEXT[: len(TEXT) // 2],
        TEXT.replace("🙂", "\ufffd"),
        "\ud800" + TEXT,
        "",
    ],
)
def test_any_other_text_is_refused(spelled, other):
    _, check, ids = spelled
    with pytest.raises(ValueError, match=f"text is not that of the {len(ids)} output_ids"):
        check.check(array(ids), other)


def test_a_text_of_no_ids_is_refused(spelled):
    _, check, _ = spelled
    with pytest.raises(ValueError, match="text is not empty, but there are no output_ids"):
        check.check(array([]), "Score: 5")


def sentence_piece():
    """As Mistral's: a space is a character of the next word, and what has no token is spelled in bytes."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"Scor:512x+=", "\u2581x"]
    vocabulary = {name: i for i, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocabulary, [("\u2581", "x")], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def words():
    return AutoTokenizer.from_pretrained("recipes/miniature/policy")


@pytest.mark.parametrize(
    ("make", "text", "others"),
    [
        (sentence_piece, "x = x + 步🙂\nScore: 5", ["x = x + 步🙂\nScore: 1", "x = x + 🙂\nScore: 5", "5", ""]),
        (words, "1 + 2 = 3", ["1 + 2 = 4", "1 + 2", "1 + 2 = 3 ### 3"]),
    ],
)
def test_tokenizers_that_do_not_spell_in_bytes_are_compared_too(make, text, others):
    tokenizer = make()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    check = text_check_of(tokenizer)
    check.check(array(ids), text)
    check.check(array([*ids, tokenizer.eos_token_id]), text)
    for other in others:
        with pytest.raises(ValueError, match="text is not that of"):
            check.check(array(ids), other)


def test_texts_of_a_decoder_that_changes_its_tokens_are_not_compared():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    backend.decoder = decoders.Replace("a", "e")
    assert text_check_of(PreTrainedTokenizerFast(tokenizer_object=backend)) is None
