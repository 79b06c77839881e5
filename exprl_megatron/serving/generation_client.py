"""The requests that continue or score tokens: SGLang's /generate, as a typed async client."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np

from exprl_megatron.models.routing import Routing
from exprl_megatron.serving.flat_log_probs import FLAT_REQUESTED
from exprl_megatron.serving.generation import (
    ExpectedReply,
    Generation,
    Scores,
    read_generation,
    read_generations,
    read_scores,
    reply_limit,
)
from exprl_megatron.serving.http_client import HttpClient
from exprl_megatron.serving.routed_experts import sent_bytes
from exprl_megatron.utils.reply_threads import in_reply_thread
from exprl_megatron.utils.text_check import TextCheck
from exprl_megatron.utils.token_ids import TokenIds

_READ_IN_THREAD = 2**14
"""Bytes from which on a reply is read in a thread; a shorter one costs less than the way there and back."""


class GenerationClient(HttpClient):
    """The part of SGLangClient that samples and scores; see HttpClient for its use and its errors."""

    vocabulary: int | None = None
    """The number of token ids of the model; a reply with a larger id is refused. None: any id is accepted."""
    text_check: TextCheck | None = None
    """The model's check that a reply's text is that of its token ids. None: any text is accepted."""

    async def generate(
        self,
        input_ids: Sequence[int] | np.ndarray,
        *,
        temperature: float,
        max_new_tokens: int,
        seed: int,
        top_p: float = 1.0,
        top_k: int = -1,
        stop_token_ids: Sequence[int] = (),
        regex: str | None = None,
        json_schema: str | None = None,
        watched_ids: Sequence[int] = (),
        log_probs: bool = True,
        routing: Routing | None = None,
        deadline_s: float | None = None,
    ) -> Generation:
        """Continue `input_ids`, int [tokens]; the same seed gives the same tokens under the same weights.

        The keywords are the fields of SamplingConfig, so `**sampling.model_dump()` fits. Temperature 0 is greedy.
        `regex` or `json_schema` (JSON text) constrains the text. The end-of-sequence token, where sampled, is among the
        tokens. `watched_ids` are tokens whose log-probs are returned at every position. Without `log_probs` and
        `watched_ids` the reply is shorter and has none. `routing`, that of the model, asks for the chosen experts,
        which a server with `--enable-return-routed-experts` returns. `deadline_s`: seconds until the request fails.

        More than 7 parameters: they are the fields of SGLang's request.

        Raises:
            ServerError: the server refuses, dies or exceeds the deadline.
        """
        params = {
            "temperature": temperature,
            "max_new_tokens": max_new_tokens,
            "top_p": top_p,
            "top_k": top_k,
            "stop_token_ids": list(stop_token_ids),
            "sampling_seed": seed,
        }
        if regex is not None:
            params["regex"] = regex
        if json_schema is not None:
            params["json_schema"] = json_schema
        asked = self._asked(max_new_tokens, log_probs, watched_ids, routing)
        request = {"input_ids": _listed(input_ids), "sampling_params": params, "return_logprob": asked.log_probs}
        request |= _forms_wanted(asked)
        if watched_ids:
            request["token_ids_logprob"] = list(watched_ids)
        limit = _limit(asked, len(input_ids), max_new_tokens)
        reply = await self._exchange("POST", "/generate", request, deadline_s, limit)
        return await self._read_reply("/generate", lambda body: read_generation(body, asked), reply)

    async def generate_all(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        watched_ids: Sequence[int] = (),
        log_probs: bool = True,
        routing: Routing | None = None,
        deadline_s: float | None = None,
        **sampling: Any,
    ) -> list[Generation]:
        """Return what `generate` returns for each of `prompts`, int [tokens] each, with its seed and the same keywords,
        by one request.

        The reply comes when all continuations are written. One that the server refuses, or an unreadable one, fails the
        whole request; send each prompt in a request of its own then.

        Raises:
            ServerError: as `generate`.
        """
        asked = self._asked(max_new_tokens, log_probs, watched_ids, routing)
        params = {"max_new_tokens": max_new_tokens} | {k: v for k, v in sampling.items() if v is not None}
        request: dict[str, Any] = {
            "input_ids": [_listed(prompt) for prompt in prompts],
            "sampling_params": [params | {"sampling_seed": seed} for seed in seeds],
            "return_logprob": asked.log_probs,
        }
        request |= _forms_wanted(asked)
        if watched_ids:
            request["token_ids_logprob"] = [list(watched_ids)] * len(prompts)
        limit = sum(_limit(asked, len(prompt), max_new_tokens) for prompt in prompts)
        reply = await self._exchange("POST", "/generate", request, deadline_s, limit)
        return await self._read_reply("/generate", lambda body: read_generations(body, asked, len(prompts)), reply)

    async def prefill(self, input_ids: Sequence[int] | np.ndarray, *, deadline_s: float | None = None) -> None:
        """Return when the radix cache holds `input_ids`, int [tokens], for the requests that begin with them."""
        request = {"input_ids": _listed(input_ids), "sampling_params": {"max_new_tokens": 0}}
        await self._post("/generate", request, deadline_s, reply_limit(0))

    async def score(
        self, input_ids: Sequence[int] | np.ndarray, first: int, *, deadline_s: float | None = None
    ) -> Scores:
        """Return the log-probs of `input_ids`, int [tokens], from token number `first` on (at least 1), given those
        before.

        They are at temperature 1: SGLang's log-probs of a prompt are of raw logits, whatever the request's temperature.
        Nothing is sampled. See SCORED_BELOW_ROOM (config/serving.py) for the longest sequence.

        Raises:
            ServerError: the server refuses, dies or exceeds the deadline of `deadline_s` seconds.
        """
        request = {
            "input_ids": _listed(input_ids),
            "sampling_params": {"max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": first - 1,
        }
        reply = await self._exchange("POST", "/generate", request, deadline_s, reply_limit(len(input_ids)))
        return await self._read_reply("/generate", lambda answer: read_scores(answer, input_ids[first:]), reply)

    def _asked(
        self, max_new_tokens: int, log_probs: bool, watched_ids: Sequence[int], routing: Routing | None
    ) -> ExpectedReply:
        log_probs = log_probs or bool(watched_ids)
        return ExpectedReply(max_new_tokens, self.vocabulary, log_probs, tuple(watched_ids), self.text_check, routing)

    async def _read_reply[T](self, path: str, parse: Callable[[bytes], T], reply: bytes) -> T:
        """Read a long reply in a thread: the event loop continues meanwhile."""
        if len(reply) < _READ_IN_THREAD:
            return self._read(path, parse, reply)
        return await in_reply_thread(self._read, path, parse, reply, size=len(reply))


def _forms_wanted(asked: ExpectedReply) -> dict[str, bool]:
    """Return the fields of a request for the arrays that the reply is expected to have."""
    experts = {} if asked.routing is None else {"return_routed_experts": True}
    return experts | (FLAT_REQUESTED if asked.log_probs else {})


def _limit(asked: ExpectedReply, prompt_tokens: int, new_tokens: int) -> int:
    """Return the bytes that the reply to one prompt may have."""
    experts = 0 if asked.routing is None else sent_bytes(prompt_tokens + new_tokens, asked.routing)
    return reply_limit(new_tokens, len(asked.watched_ids)) + experts


def _listed(token_ids: Sequence[int] | np.ndarray) -> list[int] | msgspec.Raw:
    if isinstance(token_ids, TokenIds):
        return msgspec.Raw(token_ids.json)
    return token_ids.tolist() if isinstance(token_ids, np.ndarray) else list(token_ids)
