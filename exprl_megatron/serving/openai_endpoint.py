"""Client of any OpenAI-compatible server: chats in, answers with the probabilities of their tokens out."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any

import msgspec

from exprl_megatron.config.judging import JudgeConfig
from exprl_megatron.errors import UserError
from exprl_megatron.serving.generation import LOG_PROB_ROUNDING
from exprl_megatron.serving.http_client import HttpClient

TOP_LOG_PROBS = 20
"""As many as the interface allows."""
_TOKEN_BYTES = 1024 + TOP_LOG_PROBS * 256
"""Bytes of a reply for each token that was asked for, with its alternatives."""
_FRAME_BYTES = 2**18
_CHAT = "/chat/completions"


@dataclass(frozen=True)
class Token:
    """One token of an answer."""

    text: str
    alternatives: tuple[tuple[str, float], ...]
    """The most probable tokens at its place, itself among them usually: (text, natural log of the probability)."""


@dataclass(frozen=True)
class Completion:
    """One answer of /chat/completions."""

    text: str
    finish_reason: str
    """`stop`, `length`, `content_filter` or what else the server says."""
    refusal: str | None
    """The model's words where it refused to answer."""
    tokens: tuple[Token, ...]
    """Empty where their probabilities were not asked for, or are not reported."""
    prompt_tokens: int
    cached_tokens: int


class _Alternative(msgspec.Struct):
    token: str
    logprob: float


class _Entry(msgspec.Struct):
    token: str
    top_logprobs: list[_Alternative] | None = None


class _Message(msgspec.Struct):
    content: Any = None
    refusal: Any = None


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str
    logprobs: Any = None


class _Reply(msgspec.Struct):
    choices: Annotated[list[_Choice], msgspec.Meta(min_length=1)]
    usage: Any = None


class OpenAIEndpoint(HttpClient):
    """Speaks to one OpenAI-compatible server; use as `async with endpoint:` within one event loop at a time.

    `url` ends in `/v1` usually; `model` is the name of the model there. `arguments` are fields of each request, in
    addition to the usual ones or in their place; None leaves a field out. Raises what HttpClient does.
    """

    def __init__(
        self,
        url: str,
        model: str,
        name: str,
        *,
        api_key: str | None = None,
        deadline_s: float = 600.0,
        arguments: Mapping[str, Any] = MappingProxyType({}),
    ):
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        super().__init__(url, name, deadline_s=deadline_s, headers=headers)
        self.model = model
        self._arguments = dict(arguments)

    async def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        temperature: float,
        max_new_tokens: int,
        seed: int,
        log_probs: bool = False,
        template_args: Mapping[str, Any] | None = None,
        deadline_s: float | None = None,
    ) -> Completion:
        """Answer a chat. `template_args` go to the chat template of servers that take such (SGLang, vLLM)."""
        request: dict[str, Any] = {
            "model": self.model,
            "messages": [dict(message) for message in messages],
            "temperature": temperature,
            "max_tokens": max_new_tokens,
            "seed": seed,
        }
        if log_probs:
            request |= {"logprobs": True, "top_logprobs": TOP_LOG_PROBS}
        if template_args:
            request["chat_template_kwargs"] = dict(template_args)
        request = {name: value for name, value in (request | self._arguments).items() if value is not None}
        limit = _FRAME_BYTES + max_new_tokens * _TOKEN_BYTES
        return self._read(_CHAT, _completion, await self._post(_CHAT, request, deadline_s, limit))

    async def health(self, *, deadline_s: float = 10.0) -> None:
        """Return where the server lists its models within the deadline, else raise."""
        await self._request("GET", "/models", None, deadline_s)


def judge_endpoints(config: JudgeConfig) -> list[OpenAIEndpoint]:
    """Return clients of `config.endpoints`, named `judge-0`, `judge-1`, ..., with the key from the environment.

    Raises:
        UserError: `config.api_key_variable` names a variable that is not set.
    """
    variable = config.api_key_variable
    key = None if variable is None else os.environ.get(variable)
    if variable is not None and not key:
        raise UserError(
            f"judge.api_key_variable is {variable}, but there is no such environment variable; set it to the key."
        )
    return [
        OpenAIEndpoint(
            url,
            config.endpoint_model,
            f"judge-{i}",
            api_key=key,
            deadline_s=config.deadline_s,
            arguments=config.endpoint_args,
        )
        for i, url in enumerate(config.endpoints)
    ]


def _completion(reply: dict) -> Completion:
    """Return the answer in a reply; TypeError or ValueError where it has none, or another form."""
    form = msgspec.convert(reply, _Reply)
    choice, usage = form.choices[0], form.usage if isinstance(form.usage, dict) else {}
    tokens = choice.logprobs.get("content") if isinstance(choice.logprobs, dict) else None
    refusal = choice.message.refusal
    return Completion(
        text=_text(choice.message.content),
        finish_reason=choice.finish_reason,
        refusal=refusal if isinstance(refusal, str) and refusal else None,
        tokens=tuple(map(_token, tokens if isinstance(tokens, list) else ())),
        prompt_tokens=_count(usage, "prompt_tokens"),
        cached_tokens=_count(usage.get("prompt_tokens_details"), "cached_tokens"),
    )


def _text(content: Any) -> str:
    """Return the text of a message, which may be in parts; parts of other kinds (reasoning) are not the answer."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise TypeError(f"content is a {type(content).__name__}")
    texts = [part if isinstance(part, str) else part.get("text") for part in content if _is_text(part)]
    return "".join(text for text in texts if isinstance(text, str))


def _is_text(part: Any) -> bool:
    return isinstance(part, str) or (isinstance(part, dict) and part.get("type", "text") in ("text", "output_text"))


def _count(counts: Any, name: str) -> int:
    """Return a count of tokens, for the logs alone; 0 where it is not reported as one."""
    value = counts.get(name) if isinstance(counts, dict) else None
    return value if isinstance(value, int) else 0


def _token(entry: Any) -> Token:
    token = msgspec.convert(entry, _Entry)
    alternatives = tuple((a.token, a.logprob) for a in token.top_logprobs or ())
    if not all(log_prob <= LOG_PROB_ROUNDING for _, log_prob in alternatives):
        raise ValueError("top_logprobs has a logprob that is above 0 or not a number")
    return Token(token.token, alternatives)
