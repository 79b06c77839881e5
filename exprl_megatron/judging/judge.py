"""The judge: asks a frozen language model, with the reference in its hands, what a trace is worth."""

import asyncio
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from exprl_megatron.config.judging import JudgeConfig
from exprl_megatron.errors import UserError
from exprl_megatron.judging.judgement import Abstained, Judgement, Scored
from exprl_megatron.judging.prompt import load_prompt
from exprl_megatron.judging.verdict import normalise, parse_score, stated_score
from exprl_megatron.problems.problem import Problem
from exprl_megatron.rollout.trace import Trace

SCORE_REGEX = "Score: [1-5]"
# The judgement's own deadline passes first: it is an abstention, and a request's deadline an error.
REQUEST_GRACE_S = 30.0


class Written(Protocol):
    """What a server wrote."""

    @property
    def text(self) -> str: ...


class Generator(Protocol):
    """The part of a serving client that judging needs; raises where the server is dead."""

    async def generate(
        self,
        input_ids: Sequence[int],
        *,
        temperature: float,
        max_new_tokens: int,
        seed: int,
        regex: str | None,
        deadline_s: float | None,
    ) -> Written: ...


class Judge:
    """Grades traces; use within one event loop.

    `tokenizer` is the judge's own Hugging Face tokenizer, `clients` its servers, `context_tokens` the
    longest request that they take (prompt and verdict; by default what the model's config.json says).
    All traces of a problem go to the same server, whose radix cache then holds all but the trace.
    Raises UserError where the prompt cannot be used or the tokenizer has no chat template.
    """

    def __init__(
        self, config: JudgeConfig, clients: Sequence[Generator], tokenizer: Any, context_tokens: int | None = None
    ):
        if not tokenizer.chat_template:
            raise UserError(f"The judge's tokenizer in {config.model} has no chat template; add one to it.")
        self._config = config
        self._clients = clients
        self._tokenizer = tokenizer
        self._context_tokens = context_tokens or model_context(config.model)
        self._prompt = load_prompt(config.prompt or "math-outcome")
        self._control = _control_tokens(tokenizer)
        self._slots = asyncio.Semaphore(config.concurrency)

    async def judge(self, problem: Problem, trace: Trace) -> Judgement:
        """The verdict on one trace; raises what the client raises where its server is dead.

        Abstains with `too-long`, `timeout`, `unreadable` or `out-of-range`; the latter two only after
        the verdict was asked for again as often as the config says.
        """
        request = self.request(problem, trace.text)
        if len(request) + self._config.max_new_tokens > self._context_tokens:
            return Abstained("too-long", f"{len(request)} prompt tokens, {self._context_tokens} in all")
        async with self._slots:
            try:
                async with asyncio.timeout(self._config.deadline_s) as deadline:
                    return await self._ask(request, self._client(problem), zlib.crc32(trace.text.encode()))
            except TimeoutError:
                if not deadline.expired():
                    raise
                return Abstained("timeout", f"no verdict within {self._config.deadline_s:g} s")

    def request(self, problem: Problem, trace_text: str) -> list[int]:
        """Token ids of the judge's chat about a trace.

        Control tokens of the judge's template (`<|im_end|>`) that the data spells out are broken up, so
        that data cannot open a turn of its own.
        """
        texts = (problem.statement, problem.reference.for_judge(), trace_text)
        messages = self._prompt.messages(*(self._without_control(text) for text in texts))
        return self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False, **self._config.template_args
        )

    async def _ask(self, request: list[int], client: Generator, seed: int) -> Judgement:
        verdict: Judgement = Abstained("unreadable")
        for attempt in range(1 + self._config.reasks):
            written = await client.generate(
                request,
                temperature=self._config.reask_temperature if attempt else self._config.temperature,
                max_new_tokens=self._config.max_new_tokens,
                seed=(seed + attempt) % 2**31,
                regex=SCORE_REGEX if self._config.score_format == "constrained" else None,
                deadline_s=self._config.deadline_s + REQUEST_GRACE_S,
            )
            verdict = read_verdict(written.text)
            if isinstance(verdict, Scored):
                break
        return verdict

    def _client(self, problem: Problem) -> Generator:
        return self._clients[zlib.crc32(problem.id.encode()) % len(self._clients)]

    def _without_control(self, text: str) -> str:
        return self._control.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text) if self._control else text


def read_verdict(text: str) -> Judgement:
    """A judge's words as a judgement: the score in [0, 1], or an abstention that says why."""
    score = parse_score(text)
    if score is not None:
        return Scored(normalise(score), text)
    return Abstained("unreadable" if stated_score(text) is None else "out-of-range", text)


def model_context(model: str) -> int:
    """Positions that the model in directory `model` was made for; UserError where its config does not say."""
    path = Path(model) / "config.json"
    try:
        return int(json.loads(path.read_text())["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"The judge's context length cannot be read from {path} ({error!r}); "
            "give judge.model a directory whose config.json has max_position_embeddings."
        ) from error


def _control_tokens(tokenizer: Any) -> re.Pattern | None:
    """Matches every control token that the tokenizer would recognise within plain text."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = sorted((name for name in added | set(tokenizer.all_special_tokens) if len(name) > 1), reverse=True)
    return re.compile("|".join(map(re.escape, names))) if names else None
