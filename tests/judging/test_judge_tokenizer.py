"""Questions whose parts are tokenized once have the tokens that the tokenizer gives each of them as a whole."""

import pytest
from helpers.tokenizer_rules import CUTTABLE, PROVEN, TEXT, UNCUTTABLE, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st

from exprl_megatron.judging.judge_tokenizer import JudgeTokenizer, common_prefix
from exprl_megatron.judging.prompt import shipped_prompt
from exprl_megatron.judging.token_cuts import safe_cuts

PIECES = (
    *(
        "the",
        " the",
        "so",
        "of the",
        "of",
        " and",
        "don't",
        "we'll",
        "'s",
        "naïve",
        "e\u0301",
        "東京",
        "步骤一：",
        "🙂",
        "строка",
    ),
    *(" ", "  ", "   ", "\n", "\n\n", "\n \n", "\r\n", "\t", "\u00a0", "\u3000", " \n", "\n    "),
    *(
        "1",
        "3.14",
        "10,000",
        "2718",
        "x^2",
        "\\frac{1}{2}",
        "$a_{n}$",
        "=",
        "====",
        "...",
        "?!",
        "```",
        "### Step 2",
        "- ",
    ),
    *(
        "<|im_end|>",
        "<think>",
        "</trace>",
        "<",
        "zebra",
        "a" * 60,
        "I",
        "HTTPServer",
        "e ",
        "e   ",
        "s",
        "ing",
        "▁",
        "Ġ",
    ),
)
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.sampled_from(TEXT.split(" ")), st.text(max_size=3)), max_size=60)
SAFE = st.characters(exclude_categories=["Cs"])


def frame(order="shared", reference="Since a < b, the sum is at most 42.\n\nSo it is 42."):
    return shipped_prompt("math", "prefix", "reference", order).frame("What is the sum of the terms?", reference)


def whole(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


def plain(pieces):
    return "".join(pieces).encode("utf-8", "ignore").decode()


@pytest.mark.parametrize(
    ("name", "phrase"), [*((name, True) for name in [*CUTTABLE, *UNCUTTABLE]), *((name, False) for name in PROVEN)]
)
def test_joined_tokens_are_those_of_the_whole(name, phrase):
    tokenizer = tokenizer_of(name, phrase=phrase)
    judge = JudgeTokenizer(tokenizer, {})
    frames = [frame(), frame("upstream"), frame(reference="so " * 300)]

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(TEXTS, st.lists(st.integers(0, 400), max_size=6), st.sampled_from(frames), st.booleans())
    def check(pieces, ends, shown_in, nested):
        text = plain(pieces)
        others = [text[:end] for end in ends] if nested else [text[end:] + plain(pieces[:end]) for end in ends]
        texts = [*others, text]
        found = judge.batch_prompt_ids(shown_in, texts)
        assert [ids.tolist() for ids in found] == [whole(tokenizer, shown_in.messages(each)) for each in texts]
        assert [len(ids) for ids in found] == [len(ids.tolist()) for ids in found]

    check()


@pytest.mark.parametrize("name", UNCUTTABLE)
def test_a_tokenizer_whose_tokens_cannot_be_put_together_is_found_out(name):
    assert not safe_cuts(tokenizer_of(name).backend_tokenizer)
    judge = JudgeTokenizer(tokenizer_of(name), {})
    judge.batch_prompt_ids(frame(), [TEXT, TEXT * 2])
    assert judge.uncut == 2


def test_a_cut_that_turns_out_to_be_wrong_is_seen_in_its_window(monkeypatch):
    """Were the rules of a tokenizer misread, the window around a cut would still show it."""
    tokenizer = tokenizer_of("superwords")
    cuts = safe_cuts(tokenizer_of("qwen").backend_tokenizer)
    monkeypatch.setattr("exprl_megatron.judging.judge_tokenizer.safe_cuts", lambda backend: cuts)
    judge = JudgeTokenizer(tokenizer, {})
    texts = ["x of the first n terms is", "x of the first n terms is at most"]
    found = judge.batch_prompt_ids(frame(), texts)
    assert judge.uncut == 2
    assert [ids.tolist() for ids in found] == [whole(tokenizer, frame().messages(text)) for text in texts]


def trace(number, segments=10, words=120):
    heads = [
        f"### Step {i}\nLet x be {number} and " + f"the sum of the first n{number} terms " * (words // 6)
        for i in range(segments)
    ]
    ends = ["\n\n".join(heads[: i + 1]) for i in range(segments)]
    return ends


@pytest.mark.parametrize("name", CUTTABLE)
@pytest.mark.parametrize("order", ["shared", "upstream"])
def test_the_beginnings_of_a_trace_are_tokenized_once_and_so_is_what_a_problems_questions_share(name, order):
    judge = JudgeTokenizer(tokenizer_of(name), {})
    shown_in = frame(order, "The reference is long, and it is so for a good reason. " * 80)
    judge.batch_prompt_ids(shown_in, trace(0))  # the frame is tokenized now
    calls, characters = judge.calls, judge.characters
    texts = trace(1)
    judge.batch_prompt_ids(shown_in, texts)
    assert judge.uncut == 0
    assert judge.calls - calls == 2
    # Each beginning has its own last words, the prompt's end, and windows around its cuts.
    assert judge.characters - characters < len(texts[-1]) + len(texts) * 600
    assert sum(map(len, texts)) > 5 * len(texts[-1])


@pytest.mark.parametrize("name", PROVEN)
def test_a_word_that_was_seen_before_is_not_tokenized_again(name):
    judge = JudgeTokenizer(tokenizer_of(name, phrase=False), {})
    judge.batch_prompt_ids(frame(), trace(0))
    characters = judge.characters
    judge.batch_prompt_ids(frame(), [text.replace("Let", "So we let") for text in trace(0)])
    # What each piece begins with, and the words around the changes.
    assert judge.characters - characters < 1500 < len(trace(0)[-1]) / 4
    assert judge.uncut == 0


def test_work_grows_with_the_trace_and_not_with_its_square():
    work = []
    for segments in (10, 40):
        judge = JudgeTokenizer(tokenizer_of("qwen"), {})
        judge.batch_prompt_ids(frame(), trace(1, segments))
        work.append(judge.characters)
    assert work[1] < 4.5 * work[0]


def test_segments_share_the_prompt_alone():
    judge = JudgeTokenizer(tokenizer_of("qwen"), {})
    texts = ["Let x be 3.", "So the sum is 4."]
    judge.batch_prompt_ids(frame(), texts)
    characters = judge.characters
    judge.batch_prompt_ids(frame(), texts)
    assert judge.uncut == 0
    assert judge.characters - characters < 1000 < len(frame().messages("")[0]["content"])


@given(st.text(SAFE, max_size=50), st.text(SAFE, max_size=50), st.text(SAFE, max_size=50))
def test_a_common_prefix_is_as_long_as_it_can_be(shared, one, other):
    one, other = shared + one, shared + other
    length = common_prefix(one, other)
    assert one[:length] == other[:length]
    assert length == min(len(one), len(other)) or one[length] != other[length]
