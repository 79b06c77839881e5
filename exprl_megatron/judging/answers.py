"""Sends questions to a judge: as token ids to an SGLang server, as a chat to any other endpoint."""

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
    """The sanitized text that the frame is filled with."""
    input_ids: Sequence[int]
    """Token ids of the whole prompt, under the judge's chat template."""
    max_new_tokens: int
    temperature: float
    seed: int
    deadline_s: float
    """Seconds after which the request counts as failed; longer than the caller's own deadline."""
    regex: str | None = None
    json_schema: str | None = None
    """Each constrains the answer; endpoints do not receive them."""
    probabilities: bool = False
    """Whether to request the probabilities of the digits 1..5."""

    @property
    def messages(self) -> list[dict[str, str]]:
        """The chat messages of the prompt."""
        return self.frame.messages(self.trace)


class Answer(Protocol):
    """The answer of a judge."""

    @property
    def text(self) -> str:
        """The generated text."""

    @property
    def refused(self) -> bool:
        """Whether a content filter or the model itself declined to answer."""

    @property
    def truncated(self) -> bool:
        """Whether the length limit ended the answer, so that its last words are not its verdict."""

    def digit_probabilities(self, position: int) -> dict[int, float] | None:
        """Return the probability of each digit 1..5 at character `position` of the text; None where it is unknown."""


class Answerer(Protocol):
    """One server of a judge."""

    async def answer(self, question: JudgeQuestion) -> Answer:
        """Send one question.

        Raises:
            ServerError: the server failed or cannot be reached.
            RequestRefused: the server does not accept the question.
        """
        ...

    async def answers(self, questions: Sequence[JudgeQuestion]) -> Sequence[Answer]:
        """Send questions that differ only in their texts and seeds, in one request.

        Raises:
            ServerError: the request failed; it fails as a whole where one question does.
            RequestRefused: the server does not accept the questions.
        """
        ...

    @property
    def accepts_batches(self) -> bool:
        """Whether `answers` costs less than a request for each question."""

    async def health(self) -> None:
        """Check the server.

        Raises:
            ServerError: the server is not healthy.
        """
        ...


class TokenAnswerer:
    """Sends token ids of the judge's own tokenizer and chat template to an SGLang server.

    Args:
        client: an open SGLangClient.
        tokenizer: the judge's Hugging Face tokenizer.
        vocabulary: number of token ids of the model; None where it is unknown. An answer with a larger id, or whose
            text is not the text of its ids, counts as a failure of the server.
    """

    accepts_batches = True

    def __init__(self, client: Any, tokenizer: Any, vocabulary: int | None = None):
        self._client = client
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._text_check = text_check_of(tokenizer)
        self._digits = _digit_tokens(tokenizer)

    async def answer(self, question: JudgeQuestion) -> "TokenAnswer":
        """Send one question; see Answerer.

        Raises:
            ServerError: the server failed, or its answer is damaged.
            RequestRefused: the server does not accept the question.
        """
        arguments = self._request_arguments(question)
        return self._answer(await self._client.generate(question.input_ids, seed=question.seed, **arguments))

    async def answers(self, questions: Sequence[JudgeQuestion]) -> "list[TokenAnswer]":
        """Send several questions in one request; see Answerer.

        Raises:
            ServerError: the server failed, or an answer is damaged.
            RequestRefused: the server does not accept the questions.
            ValueError: the questions differ in more than their texts and seeds.
        """
        arguments = self._request_arguments(questions[0])
        if any(self._request_arguments(question) != arguments for question in questions):
            raise ValueError("questions that are asked together have the same settings but for their seeds")
        prompts, seeds = zip(*((question.input_ids, question.seed) for question in questions), strict=True)
        generations = await self._client.generate_all(prompts, seeds, **arguments)
        return await in_reply_thread(lambda: [self._answer(generation) for generation in generations])

    def _request_arguments(self, question: JudgeQuestion) -> dict[str, Any]:
        """Return the arguments of a request besides the tokens and the seed."""
        return {
            "temperature": question.temperature,
            "max_new_tokens": question.max_new_tokens,
            "regex": question.regex,
            "json_schema": question.json_schema,
            "watched_ids": tuple(self._digits) if question.probabilities else (),
            "log_probs": question.probabilities,
            "deadline_s": question.deadline_s,
        }

    def _answer(self, generation: Any) -> "TokenAnswer":
        if generation.finish_reason == "abort":
            raise ServerError(f"{self._client.name} ({self._client.url}) aborted a judgement.")
        self._check(generation)
        return TokenAnswer(
            generation.text,
            generation.token_ids,
            generation.watched_log_probs,
            self._digits,
            self._tokenizer,
            truncated=generation.finish_reason == "length",
        )

    def _check(self, generation: Any) -> None:
        ids = np.asarray(generation.token_ids)
        try:
            if self._vocabulary is not None and len(ids) and ids.max() >= self._vocabulary:
                raise ValueError(f"output_ids has {ids.max()}, but the vocabulary has {self._vocabulary} ids")
            if self._text_check is not None:
                self._text_check.check(ids, generation.text)
        except ValueError as error:
            raise ServerError(f"{self._client.name} ({self._client.url}), asked for a judgement: {error}.") from error

    async def health(self) -> None:
        """Check the server; see Answerer."""
        await self._client.health()


@dataclass(frozen=True)
class TokenAnswer:
    """An answer of TokenAnswerer."""

    text: str
    token_ids: tuple[int, ...]
    watched_log_probs: tuple[tuple[float, ...], ...]
    digits: Mapping[int, int] = field(repr=False)
    """Token id -> digit, in the order of `watched_log_probs`."""
    tokenizer: Any = field(repr=False)
    refused: bool = False
    truncated: bool = False

    def digit_probabilities(self, position: int) -> dict[int, float] | None:
        """Return the probability of each digit 1..5 at character `position` of the text; see Answer."""
        tokens = TokenText(self.token_ids, self.tokenizer)
        if not self.watched_log_probs or tokens.text[position : position + 1] != self.text[position]:
            return None
        token = tokens.token_at(position)
        if self.digits.get(self.token_ids[token]) != int(self.text[position]):
            return None
        return _probabilities(zip(self.digits.values(), self.watched_log_probs[token], strict=True))


class ChatAnswerer:
    """Sends chat messages to an OpenAI-compatible endpoint, which applies its model's chat template itself."""

    accepts_batches = False

    def __init__(self, endpoint: Any, template_args: Mapping[str, Any]):
        self._endpoint = endpoint
        self._template_args = template_args

    async def answer(self, question: JudgeQuestion) -> "ChatAnswer":
        """Send one question; see Answerer."""
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
        return ChatAnswer(completion.text, tokens, truncated=completion.finish_reason == "length")

    async def answers(self, questions: Sequence[JudgeQuestion]) -> "list[ChatAnswer]":
        """Send a request for each question; see Answerer."""
        return await gather_or_cancel([self.answer(question) for question in questions])

    async def health(self) -> None:
        """Check the endpoint; see Answerer."""
        await self._endpoint.health()


@dataclass(frozen=True)
class ChatAnswer:
    """An answer of ChatAnswerer."""

    text: str
    tokens: tuple[tuple[str, Sequence[tuple[str, float]]], ...]
    """Each token's text and its alternatives (text, log-prob)."""
    refused: bool = False
    truncated: bool = False

    def digit_probabilities(self, position: int) -> dict[int, float] | None:
        """Return the probability of each digit 1..5 at character `position` of the text; see Answer."""
        end = 0
        for text, alternatives in self.tokens:
            end += len(text)
            if end > position:
                if not (stated := _DIGIT.fullmatch(text)) or stated[1] != self.text[position]:
                    return None
                matches = ((_DIGIT.fullmatch(token), log_prob) for token, log_prob in alternatives)
                return _probabilities((int(match[1]), log_prob) for match, log_prob in matches if match)
        return None


def _digit_tokens(tokenizer: Any) -> dict[int, int]:
    """Map every token that is a digit 1..5, with or without a space before it, to the digit."""
    matches = ((token, _DIGIT.fullmatch(text)) for text, token in tokenizer.get_vocab().items())
    return {token: int(match[1]) for token, match in sorted(matches, key=lambda pair: pair[0]) if match}


def _probabilities(pairs: Any) -> dict[int, float]:
    """Sum the probabilities of (digit, log-prob) pairs by digit."""
    found = dict.fromkeys(range(LOWEST, HIGHEST + 1), 0.0)
    for digit, log_prob in pairs:
        found[digit] += math.exp(log_prob)
    return found
