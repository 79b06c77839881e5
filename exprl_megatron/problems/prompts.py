"""Builds the prompts of the policy, in token ids, from the texts of problems."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jinja2

from exprl_megatron.config.problems import PromptConfig
from exprl_megatron.errors import UserError
from exprl_megatron.problems.problem import Problem
from exprl_megatron.problems.records import raise_faults

MAX_UNKNOWN_SHARE = 0.5
"""A problem whose text has a larger share of unknown tokens is refused: the tokenizer does not support its language."""


class PromptBuilder:
    """Applies the chat template of the policy's tokenizer to a problem's text.

    It takes text and never a Problem, so that no reference can reach it.

    Args:
        tokenizer: the policy's Hugging Face tokenizer.
        config: the section `prompt` of the run's config.

    Raises:
        UserError: the tokenizer has no chat template, or its template refuses the config's messages.
    """

    def __init__(self, tokenizer: Any, config: PromptConfig):
        if not tokenizer.chat_template:
            raise UserError(
                f"The tokenizer in {tokenizer.name_or_path} has no chat template; add chat_template.jinja to it."
            )
        self._tokenizer = tokenizer
        self._config = config
        self._control = special_token_pattern(tokenizer)
        check_template(tokenizer, _messages(config, "1 + 1"), config.template_args, "prompt")

    def token_ids(self, text: str) -> tuple[int, ...]:
        """Return the token ids of the prompt, which ends with the start of the assistant's turn."""
        return chat_token_ids(self._tokenizer, self._config, self._config.user.replace("{problem}", text))

    def fault(self, text: str) -> str | None:
        """Return why `text` would not reach the policy unchanged; None where it does."""
        if control := self._control and self._control.search(text):
            return (
                f"contains {control[0]!r}, which is a control token of the tokenizer in {self._tokenizer.name_or_path} "
                "and would not be encoded as text; remove it, or put a space into it."
            )
        unknown = self._tokenizer.unk_token_id
        if unknown is not None:
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            if ids and ids.count(unknown) > MAX_UNKNOWN_SHARE * len(ids):
                return (
                    f"has {ids.count(unknown)} unknown tokens of {len(ids)} for the tokenizer in "
                    f"{self._tokenizer.name_or_path}; use a model that knows its language and characters."
                )
        return None


def special_token_pattern(tokenizer: Any) -> re.Pattern | None:
    """Return a pattern that matches special tokens of `tokenizer` in plain text, which it would not encode as text."""
    names = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    names |= set(tokenizer.all_special_tokens)
    longest_first = sorted(filter(None, names), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def check_template(tokenizer: Any, messages: Sequence[dict[str, str]], template_args: dict, section: str) -> None:
    """Check that the tokenizer's chat template accepts `messages` and shows all of them.

    `section` is the section of the config that has them (`prompt`, `judge`).

    Raises:
        UserError: the template refuses the messages, or omits one of them.
    """
    system = messages[0]["role"] == "system"
    key = f"{section}.system" if section == "prompt" and system else section
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **template_args)
    except jinja2.TemplateError as error:
        remedy = "leave the system message out" if system else "choose another template"
        raise UserError(
            f"The chat template of the tokenizer in {tokenizer.name_or_path} does not accept the messages of {key} "
            f"({' '.join(str(error).split()) or type(error).__name__}); {remedy}, or give it a template that does."
        ) from error
    lacking = [message["role"] for message in messages if message["content"].strip() not in text]
    if lacking:
        raise UserError(
            f"The chat template of the tokenizer in {tokenizer.name_or_path} leaves out the {lacking[0]} message of "
            f"{key}; give it a template that shows it."
        )


def chat_token_ids(tokenizer: Any, config: PromptConfig, user: str) -> tuple[int, ...]:
    """Tokenize the config's system message and the user message `user`, up to the start of the assistant's turn."""
    ids = tokenizer.apply_chat_template(
        _messages(config, user), add_generation_prompt=True, tokenize=True, return_dict=False, **config.template_args
    )
    return tuple(ids)


def _messages(config: PromptConfig, user: str) -> list[dict[str, str]]:
    system = [] if config.system is None else [{"role": "system", "content": config.system}]
    return [*system, {"role": "user", "content": user}]


@dataclass(frozen=True)
class PromptedProblems:
    """The problems that are short enough, their prompts in the same order, and the number of the other problems."""

    problems: tuple[Problem, ...]
    prompts: tuple[tuple[int, ...], ...]
    dropped: int

    def __len__(self) -> int:
        return len(self.problems)

    @cached_property
    def index_of(self) -> Mapping[str, int]:
        """The index of each problem by its id."""
        return {problem.id: index for index, problem in enumerate(self.problems)}


def check_vocabulary(model: str, size: int, prompts: Sequence[Sequence[int]]) -> None:
    """Check that the model in directory `model` has all tokens of the prompts; another token makes the server exit.

    Args:
        model: directory of the model.
        size: number of token ids of the model.
        prompts: token ids of the prompts.

    Raises:
        UserError: a prompt has a token id of `size` or more.
    """
    largest = max(max(ids) for ids in prompts)
    if largest >= size:
        raise UserError(
            f"The tokenizer in {model} returns token id {largest}, but its model has {size} tokens; use the model's "
            "own tokenizer."
        )


def drop_overlong(problems: Sequence[Problem], builder: PromptBuilder, max_tokens: int) -> PromptedProblems:
    """Leave out the problems whose prompt is longer than `max_tokens`.

    Raises:
        UserError: no problem is left, or the text of a problem would not reach the policy unchanged.
    """
    faults = ((problem, builder.fault(problem.statement)) for problem in problems)
    raise_faults([f"problem {problem.id} {fault}" for problem, fault in faults if fault is not None])
    prompted = [(problem, builder.token_ids(problem.statement)) for problem in problems]
    short_enough = [(problem, ids) for problem, ids in prompted if len(ids) <= max_tokens]
    if not short_enough:
        shortest = min((len(ids) for _, ids in prompted), default=0)
        raise UserError(
            f"None of the {len(prompted)} problems has a prompt of at most {max_tokens} tokens (the shortest has "
            f"{shortest}); raise max_prompt_tokens or policy.max_tokens, or lower sampling.max_new_tokens."
        )
    return PromptedProblems(
        problems=tuple(problem for problem, _ in short_enough),
        prompts=tuple(ids for _, ids in short_enough),
        dropped=len(prompted) - len(short_enough),
    )
