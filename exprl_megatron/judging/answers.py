"""Questions to a judge and its answers: through token ids to an SGLang server, as a chat to any other endpoint."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from exprl_megatron.errors import ServerError
from exprl_megatron.judging.prompt import PromptFrame
from exprl_megatron.judging.token_text import TokenText
from exprl_megatron.judging.verdict import HIGHEST, LOWEST
from exprl_megatron.utils.reply_threads import in_reply_thread
from exprl_megatron.utils.text_check import text_check_of
from exprl_megatron.utils.together import gather_or_cancel

_DIGIT = re.compile(rf"[\sĠ▁]*([{LOWEST}-{HIGHEST}])")


@dataclass(frozen=True)
class JudgeQuestion:
    """One request to a judge."""

    frame: PromptFrame
    trace: str
    """What the frame shows; plain data."""
    input_ids: Sequence[int]
    """The same in tokens, under the judge's own template."""
    max_new_tokens: int
    temperature: float
    seed: int
    deadline_s: float
    """After which the server is given up; longer than what the asker itself waits."""
    regex: str | None = None
    json_schema: str | None = None
    """Either constrains the answer; endpoints do not receive it."""
    probabilities: bool = False
    """Whether the probabilities of the digits 1..5 are wanted."""

    @property
    def messages(self) -> list[dict[str, str]]:
        """The chat."""
        return self.frame.messages(self.trace)


class Answer(Protocol):
    """What a server wrote."""

    @property
    def text(self) -> str: ...

    @property
    def refused(self) -> bool:
        """Whether a content filter or the model itself declined to answer."""

    @property
    def cut_off(self) -> bool:
        """Whether the length limit ended it, so that its last words are not its verdict."""

    def digit_probabilities(self, place: int) -> dict[int, float] | None:
        """Probability of each digit 1..5 at character `place` of the text; None where that is not known."""


class Answerer(Protocol):
    """One server; raises ServerError where it is dead, and RequestRefused where it does not take the question."""

    async def answer(self, question: JudgeQuestion) -> Answer: ...

    async def answers(self, questions: Sequence[JudgeQuestion]) -> Sequence[Answer]:
        """The answers to questions that differ in what they show and in their seeds alone, by one request.

        It fails as a whole where one of them does.
        """

    @property
    def accepts_batches(self) -> bool:
        """Whether `answers` costs less than as many requests."""

    async def health(self) -> None: ...


class TokenAnswerer:
    """An SGLang server, asked in the tokens of the judge's own tokenizer and template.

    An answer with an id beyond `vocabulary` (None: not known), or whose text is not that of its ids, is the server's
    failure.
    """

    accepts_batches = True

    def __init__(self, client: Any, tokenizer: Any, vocabulary: int | None = None):
        self._client = client
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._text_check = text_check_of(tokenizer)
        self._digits = _digit_tokens(tokenizer)

    async def answer(self, question: JudgeQuestion) -> "TokenAnswer":
        settings = self._settings(question)
        return self._answer(await self._client.generate(question.input_ids, seed=question.seed, **settings))

    async def answers(self, questions: Sequence[JudgeQuestion]) -> "list[TokenAnswer]":
        settings = self._settings(questions[0])
        if any(self._settings(question) != settings for question in questions):
            raise ValueError("questions that are asked together have the same settings but for their seeds")
        prompts, seeds = zip(*((question.input_ids, question.seed) for question in questions), strict=True)
        generations = await self._client.generate_all(prompts, seeds, **settings)
        return await in_reply_thread(lambda: [self._answer(written) for written in generations])

    def _settings(self, question: JudgeQuestion) -> dict[str, Any]:
        """What is asked of a server beside the tokens and the seed."""
        return {
            "temperature": question.temperature,
            "max_new_tokens": question.max_new_tokens,
            "regex": question.regex,
            "json_schema": question.json_schema,
            "watched_ids": tuple(self._digits) if question.probabilities else (),
            "log_probs": question.probabilities,
            "deadline_s": question.deadline_s,
        }

    def _answer(self, written: Any) -> "TokenAnswer":
        if written.finish_reason == "abort":
            raise ServerError(f"{self._client.name} ({self._client.url}) aborted a judgement.")
        self._check(written)
        return TokenAnswer(
            written.text,
            written.token_ids,
            written.watched_log_probs,
            self._digits,
            self._tokenizer,
            cut_off=written.finish_reason == "length",
        )

    def _check(self, written: Any) -> None:
        ids = np.asarray(written.token_ids)
        try:
            if self._vocabulary is not None and len(ids) and ids.max() >= self._vocabulary:
                raise ValueError(f"output_ids has {ids.max()}, but the vocabulary has {self._vocabulary} ids")
            if self._text_check is not None:
                self._text_check.check(ids, written.text)
        except ValueError as error:
            raise ServerError(f"{self._client.name} ({self._client.url}), asked for a judgement: {error}.") from error

    async def health(self) -> None:
        await self._client.health()


@dataclass(frozen=True)
class TokenAnswer:
    """An answer of TokenAnswerer."""

    text: str
    token_ids: tuple[int, ...]
    watched_log_probs: tuple[tuple[float, ...], ...]
    digits: Mapping[int, int] = field(repr=False)
    """Token -> digit, in the order of `watched_log_probs`."""
    tokenizer: Any = field(repr=False)
    refused: bool = False
    cut_off: bool = False

    def digit_probabilities(self, place: int) -> dict[int, float] | None:
        tokens = TokenText(self.token_ids, self.tokenizer)
        if not self.watched_log_probs or tokens.text[place : place + 1] != self.text[place]:
            return None
        token = tokens.token_at(place)
        if self.digits.get(self.token_ids[token]) != int(self.text[place]):
            return None
        return _summed(zip(self.digits.values(), self.watched_log_probs[token], strict=True))


class ChatAnswerer:
    """An OpenAI-compatible endpoint, which puts the chat into its model's template itself."""

    accepts_batches = False

    def __init__(self, endpoint: Any, template_args: Mapping[str, Any]):
        self._endpoint = endpoint
        self._template_args = template_args

    async def answer(self, question: JudgeQuestion) -> "ChatAnswer":
        completion = await self._endpoint.chat(
            question.messages,
            temperature=question.temperature,
            max_new_tokens=question.max_new_tokens,
            seed=question.seed,
            log_probs=question.probabilities,
            template_args=self._template_args,
            deadline_s=question.deadline_s,
        )
        if completion.refusal is not None or completion.finish_reason == "content_filter":
            return ChatAnswer(completion.refusal or completion.text, (), refused=True)
        tokens = tuple((token.text, token.alternatives) for token in completion.tokens)
        return ChatAnswer(completion.text, tokens, cut_off=completion.finish_reason == "length")

    async def answers(self, questions: Sequence[JudgeQuestion]) -> "list[ChatAnswer]":
        return await gather_or_cancel([self.answer(question) for question in questions])

    async def health(self) -> None:
        await self._endpoint.health()


@dataclass(frozen=True)
class ChatAnswer:
    """An answer of ChatAnswerer."""

    text: str
    tokens: tuple[tuple[str, Sequence[tuple[str, float]]], ...]
    """Each token's text and its alternatives (text, log-prob)."""
    refused: bool = False
    cut_off: bool = False

    def digit_probabilities(self, place: int) -> dict[int, float] | None:
        end = 0
        for text, alternatives in self.tokens:
            end += len(text)
            if end > place:
                if not (stated := _DIGIT.fullmatch(text)) or stated[1] != self.text[place]:
                    return None
                matches = ((_DIGIT.fullmatch(token), log_prob) for token, log_prob in alternatives)
                return _summed((int(match[1]), log_prob) for match, log_prob in matches if match)
        return None


def _digit_tokens(tokenizer: Any) -> dict[int, int]:
    """Token -> digit, for every token that is a digit 1..5, with or without a space before it."""
    matches = ((token, _DIGIT.fullmatch(text)) for text, token in tokenizer.get_vocab().items())
    return {token: int(match[1]) for token, match in sorted(matches, key=lambda pair: pair[0]) if match}


def _summed(pairs: Any) -> dict[int, float]:
    found = dict.fromkeys(range(LOWEST, HIGHEST + 1), 0.0)
    for digit, log_prob in pairs:
        found[digit] += math.exp(log_prob)
    return found
