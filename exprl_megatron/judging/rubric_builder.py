"""Rubrics for problems, each requested once, by the first caller that needs it."""

import asyncio
import json
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

from exprl_megatron.config.judging import JudgeConfig
from exprl_megatron.judging.answers import Answer, JudgeQuestion
from exprl_megatron.judging.asking import REQUEST_GRACE_S, JudgePool
from exprl_megatron.judging.content_key import content_key
from exprl_megatron.judging.injection_guard import InjectionGuard
from exprl_megatron.judging.judgement import Abstained
from exprl_megatron.judging.prompt import PromptFrame, load_prompt
from exprl_megatron.judging.rubric import Rubric, RubricError, parse_rubric, rubric_schema
from exprl_megatron.judging.store import TRANSIENT_REASONS, JudgementStore
from exprl_megatron.problems.problem import Problem
from exprl_megatron.utils.thinking import mask_thinking

_NO_RUBRIC = "null"
"""The stored text where no rubric passed its checks."""


class RubricBuilder:
    """Builds, caches and stores the rubric of each problem; use it within one event loop.

    `fallbacks` counts, by reason, the problems that are judged by their reference alone because no rubric passed its
    checks (`failed-checks`), or the request failed (`too-long`, `refused`, `timeout`, `server-error`). After the last
    two the next caller requests the rubric again.

    Args:
        config: the section `judge` of the run's config.
        servers: clients of the judge's servers.
        tokens: returns the token ids of chat messages under the judge's template.
        guard: returns the guard for a prompt with these tags (see InjectionGuard).
        context_tokens: longest request plus answer, in tokens.
        identity: what distinguishes the judge from others in the store's keys.
        store: the judgement store, if there is one.
    """

    def __init__(
        self,
        config: JudgeConfig,
        servers: JudgePool,
        tokens: Callable[[list], Awaitable[Sequence[int]]],
        guard: Callable[[frozenset[str]], InjectionGuard],
        context_tokens: int,
        identity: Mapping[str, Any],
        store: JudgementStore | None,
    ):
        self._config = config
        self._servers = servers
        self._tokens = tokens
        self._prompt = load_prompt(config.rubric.prompt, shows="reference")
        self._guard = guard(self._prompt.tags)
        self._context_tokens = context_tokens
        self._identity = identity
        self._store = store
        self._known: dict[str, Rubric | None] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self.fallbacks: Counter[str] = Counter()

    async def rubric(self, problem: Problem) -> Rubric | None:
        """Return the problem's rubric, or None where the problem has to be judged by its reference alone.

        Of several callers at the same time one builds the rubric; if that one is canceled, the next does.

        Raises:
            ServerError: no server of the judge is healthy.
        """
        key = self._key(problem)
        if key not in self._known:
            async with self._locks.setdefault(key, asyncio.Lock()):
                if key not in self._known:
                    return await self._found(problem, key)
        return self._known[key]

    async def _found(self, problem: Problem, key: str) -> Rubric | None:
        """Return the rubric from the store, or a new one; a final result is cached and stored."""
        rubric: Rubric | Abstained
        stored = None if self._store is None else await asyncio.to_thread(self._store.find_rubric, key)
        if stored == _NO_RUBRIC:
            rubric = Abstained("failed-checks")
        elif stored is not None:
            rubric = parse_rubric(stored, self._reference(problem))
        else:
            rubric = await self._built(problem, key)
        if isinstance(rubric, Rubric):
            self._known[key] = rubric
            return rubric
        self.fallbacks[rubric.reason] += 1
        if rubric.reason not in TRANSIENT_REASONS:
            self._known[key] = None
        return None

    async def _built(self, problem: Problem, key: str) -> Rubric | Abstained:
        frame = self._prompt.frame(problem.statement, _solution(problem), guard=self._guard)
        messages = frame.messages("")
        input_ids = await self._tokens(messages)
        if len(input_ids) + self._config.rubric.max_new_tokens > self._context_tokens:
            return Abstained("too-long")
        home = zlib.crc32(problem.id.encode())

        def parse(answer: Answer) -> Rubric | Abstained:
            try:
                return parse_rubric(mask_thinking(answer.text), self._reference(problem))
            except RubricError as error:
                return Abstained("failed-checks", str(error))

        questions = self._questions(frame, input_ids, home)
        rubric, answer = await self._servers.ask(questions, home, self._config.rubric.deadline_s, parse)
        final = isinstance(rubric, Rubric) or rubric.reason == "failed-checks"
        if self._store is not None and final:
            asked = {"problem": problem.id, "messages": messages, **self._identity}
            text = rubric.to_json() if isinstance(rubric, Rubric) else _NO_RUBRIC
            await asyncio.to_thread(self._store.add_rubric, key, asked, answer, text)
        return rubric

    def _questions(self, frame: PromptFrame, input_ids: Sequence[int], seed: int) -> Iterator[JudgeQuestion]:
        config = self._config
        for attempt in range(1 + config.reasks):
            yield JudgeQuestion(
                frame=frame,
                trace="",
                input_ids=input_ids,
                max_new_tokens=config.rubric.max_new_tokens,
                temperature=config.reask_temperature if attempt else config.temperature,
                seed=(seed + attempt) % 2**31,
                deadline_s=config.rubric.deadline_s + REQUEST_GRACE_S,
                json_schema=rubric_schema(),
            )

    def _reference(self, problem: Problem) -> str:
        """Return the reference as the builder reads it, and therefore quotes it."""
        return self._guard(_solution(problem))

    def _key(self, problem: Problem) -> str:
        return content_key(
            "rubric",
            problem=problem.statement,
            reference=_solution(problem),
            prompt=self._prompt.version,
            max_new_tokens=self._config.rubric.max_new_tokens,
            identity=json.dumps(self._identity, sort_keys=True),
        )


def _solution(problem: Problem) -> str:
    """Return the text of the problem's reference; raises ValueError where it has none."""
    if problem.reference is None:
        raise ValueError(f"a rubric needs a reference, but problem {problem.id!r} has none")
    return problem.reference.for_judge()
