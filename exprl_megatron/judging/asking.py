"""Asking several judge servers: retries with backoff, hedging of stragglers, and nothing left running behind."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from exprl_megatron.config.judging import JudgeConfig
from exprl_megatron.errors import RequestRefused, ServerError
from exprl_megatron.judging.answers import Answer, Answerer, Question
from exprl_megatron.judging.judgement import Abstained

# What is asked has a deadline of its own; it passes first and is an abstention. A request's deadline is an error.
REQUEST_GRACE_S = 30.0

_DOWN_PAUSE_S = 1.0

T = TypeVar("T")


class JudgeServers:
    """Sends questions to the judge's servers; use within one event loop.

    At most `config.concurrency` requests are under way. `counts` counts `asked` (requests sent), `reasked`, `retried`,
    `hedged` and `hedge-won`.
    """

    def __init__(self, config: JudgeConfig, servers: Sequence[Answerer], counts: Counter[str]):
        self._config = config
        self._servers = servers
        self.counts = counts
        self._slots = asyncio.Semaphore(config.concurrency)

    async def ask(
        self, questions: Iterable[Question], home: int, deadline_s: float, read: Callable[[Answer], T | Abstained]
    ) -> tuple[T | Abstained, str]:
        """What `read` makes of the first answer that it can read, and the last answer's text.

        The questions are asked in turn, of the server number `home` (modulo their count) as a rule. Where none is
        answered readably the last reading is returned; without an answer at all it is an abstention: `timeout` after
        `deadline_s` (counted from when there was a slot), `refused`, or `server-error` where this question fails
        again and again although a server is well. While none is, it is asked again and again; raises ServerError where
        still none is after `deadline_s`.
        """
        down: ServerError | None = None
        questions = list(questions)
        try:
            async with self._slots, asyncio.timeout(deadline_s) as deadline:
                while True:
                    try:
                        return await self._read_in_turn(questions, home, read)
                    except RequestRefused as error:
                        return Abstained("refused", error.said), ""
                    except ServerError as error:
                        down = error
                        if await self._alive():
                            return Abstained("server-error", str(error).partition("\n")[0]), ""
                    await asyncio.sleep(_DOWN_PAUSE_S)
        except TimeoutError:
            if not deadline.expired():
                raise
        if down is not None and not await self._alive():
            raise down
        return Abstained("timeout", f"no answer within {deadline_s:g} s"), ""

    async def _read_in_turn(
        self, questions: Sequence[Question], home: int, read: Callable[[Answer], T | Abstained]
    ) -> tuple[T | Abstained, str]:
        for number, question in enumerate(questions):
            self.counts["reasked"] += number > 0
            answer = await self._answer(question, home)
            if answer.refused:
                return Abstained("refused", answer.text), answer.text
            result = read(answer)
            if not isinstance(result, Abstained):
                break
        return result, answer.text

    async def _answer(self, question: Question, home: int) -> Answer:
        """The first answer to come; whatever happens, cancellation included, no request is left under way."""
        if len(self._servers) == 1 or self._config.hedge_after_s is None:
            return await self._retried(question, home)
        first = asyncio.ensure_future(self._retried(question, home))
        running = {first}
        try:
            await asyncio.wait(running, timeout=self._config.hedge_after_s)
            if not first.done():
                running.add(asyncio.ensure_future(self._hedge(question, home + 1)))
            return await self._first_answer(first, running)
        finally:
            await _cancelled(running)

    async def _alive(self) -> bool:
        """Whether at least one server is well."""
        checks = await asyncio.gather(*(server.health() for server in self._servers), return_exceptions=True)
        for check in checks:
            if isinstance(check, BaseException) and not isinstance(check, ServerError):
                raise check
        return None in checks

    async def _first_answer(self, first: asyncio.Future, running: set[asyncio.Future]) -> Answer:
        pending = set(running)
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if not isinstance(task.exception(), ServerError):
                    self.counts["hedge-won"] += task is not first
                    return task.result()
        # Both failed; the home server's own error is the one to tell.
        return first.result()

    async def _hedge(self, question: Question, home: int) -> Answer:
        # The queue is fair: while judgements wait for slots, no hedge takes one from them.
        async with self._slots:
            self.counts["hedged"] += 1
            return await self._retried(question, home)

    async def _retried(self, question: Question, home: int) -> Answer:
        """Each attempt goes to the next server, so that one that died costs its problems a pause and no more."""
        for attempt in range(self._config.retries + 1):
            if attempt:
                self.counts["retried"] += 1
                await asyncio.sleep(self._config.retry_pause_s * 2 ** (attempt - 1))
            self.counts["asked"] += 1
            try:
                return await self._servers[(home + attempt) % len(self._servers)].answer(question)
            except RequestRefused:
                raise
            except ServerError as error:
                failure = error
        raise failure


async def _cancelled(tasks: set[asyncio.Future]) -> None:
    """Cancel the tasks and return when they have ended; their errors are of no interest any more."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
