"""Prompts: what the chat template makes of a problem's text, and what is too long."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from exprl_megatron.config.problems import PromptConfig
from exprl_megatron.errors import UserError
from exprl_megatron.problems.problem import Problem, Reference
from exprl_megatron.problems.prompts import PromptBuilder, drop_overlong

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}{% if quiet %}quiet{% endif %}"
)
SPECIAL = ["<unk>", "<system>", "<user>", "<assistant>"]
WORDS = [*SPECIAL, "be", "brief", "one", "two", "three", "four", "{problem}", "secret", "steps", "quiet"]


def _tokenizer(template=TEMPLATE):
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", chat_template=template)


def _problem(name, text):
    return Problem(name, text, Reference("secret steps"), "2")


def _text(builder, text):
    return " ".join(WORDS[i] for i in builder.token_ids(text))


def test_a_prompt_is_the_chat_with_the_assistants_turn_opened():
    assert _text(PromptBuilder(_tokenizer(), PromptConfig()), "one two") == "<user> one two <assistant>"
    config = PromptConfig(system="be brief", user="one {problem} four", template_args={"quiet": True})
    expected = "<system> be brief <user> one two three four <assistant> quiet"
    assert _text(PromptBuilder(_tokenizer(), config), "two three") == expected


def test_a_placeholder_within_the_problem_stays_as_it_is():
    builder = PromptBuilder(_tokenizer(), PromptConfig(user="be {problem}"))
    assert _text(builder, "one {problem} two") == "<user> be one {problem} two <assistant>"


def test_a_reference_is_in_no_prompt_and_cannot_be_put_into_one():
    builder = PromptBuilder(_tokenizer(), PromptConfig())
    problem = _problem("p1", "one two")
    prompted = drop_overlong([problem], builder, 10)
    assert not {WORDS.index("secret"), WORDS.index("steps")} & set(prompted.prompts[0])
    with pytest.raises(TypeError):
        builder.token_ids(problem.reference)


def test_overlong_prompts_are_dropped_and_counted():
    problems = [_problem("p1", "one"), _problem("p2", "one two three four"), _problem("p3", "two")]
    prompted = drop_overlong(problems, PromptBuilder(_tokenizer(), PromptConfig()), 3)
    assert [p.id for p in prompted.problems] == ["p1", "p3"]
    assert prompted.dropped == 1
    assert [len(ids) for ids in prompted.prompts] == [3, 3]


def test_no_prompt_that_fits_is_an_error_with_the_numbers():
    with pytest.raises(UserError, match=r"None of the 1 problems .* at most 3 tokens \(the shortest has 4\)"):
        drop_overlong([_problem("p1", "one two")], PromptBuilder(_tokenizer(), PromptConfig()), 3)


def test_a_tokenizer_without_a_chat_template_is_refused():
    with pytest.raises(UserError, match="no chat template"):
        PromptBuilder(_tokenizer(template=None), PromptConfig())
