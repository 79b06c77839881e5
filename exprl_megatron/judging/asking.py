"""Asking several judge servers: retries with backoff, hedging of stragglers, and nothing left running behind.

Why no retry library: each attempt goes to another server, may be hedged by a second request, is counted in the run's
metrics, and shares one deadline with the others. A library would replace the pause between two attempts alone.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from exprl_megatron.config.judging import JudgeConfig
from exprl_megatron.errors import RequestRefused, ServerError
from exprl_megatron.judging.answers import Answer, Answerer, JudgeQuestion
from exprl_megatron.judging.judgement import Abstained
from exprl_megatron.utils.reply_threads import in_reply_thread
from exprl_megatron.utils.together import gather_or_cancel

# What is asked has a deadline of its own; it passes first and is an abstention. A request's deadline is an error.
REQUEST_GRACE_S = 30.0

_DOWN_PAUSE_S = 1.0

T = TypeVar("T")
A = TypeVar("A")


@dataclass(frozen=True)
class Inquiry[T]:
    """What is to be found out by one question, or by the next ones where its answer cannot be read."""

    questions: Sequence[JudgeQuestion]
    read: Callable[[Answer], T | Abstained]


@dataclass(frozen=True)
class _Request[A]:
    """What is sent to a server at once."""

    questions: int
    send: Callable[[Answerer], Awaitable[A]]


class JudgeServers:
    """Sends questions to the judge's servers; use within one event loop.

    At most `config.concurrency` requests are in flight. `counts` counts `asked` (requests sent), `reasked`, `retried`,
    `hedged` and `hedge-won`.
    """

    def __init__(self, config: JudgeConfig, servers: Sequence[Answerer], counts: Counter[str]):
        self._config = config
        self._servers = servers
        self.counts = counts
        self._slots = asyncio.Semaphore(config.concurrency)
        self._next_in_queue = asyncio.Lock()

    async def ask(
        self, questions: Iterable[JudgeQuestion], home: int, deadline_s: float, read: Callable[[Answer], T | Abstained]
    ) -> tuple[T | Abstained, str]:
        """What `read` makes of the first answer that it can read, and the last answer's text.

        The questions are asked in turn, of the server number `home` (modulo their count) usually. Where none is
        answered readably the last reading is returned; without an answer at all it is an abstention: `timeout` after
        `deadline_s` (counted from when there was a slot), `refused`, or `server-error` where this question fails
        again and again although a server is well. While none is, it is asked again and again; raises ServerError where
        still none is after `deadline_s`.
        """
        down: ServerError | None = None
        questions = list(questions)
        try:
            async with self._free_slots(1), asyncio.timeout(deadline_s) as deadline:
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
        return _timeout(deadline_s), ""

    async def ask_together(
        self, inquiries: Sequence[Inquiry[T]], home: int, deadline_s: float
    ) -> list[tuple[T | Abstained, str]]:
        """What `ask` returns for each of `inquiries`, whose first questions are sent in one request where servers take
        several.

        What cannot be read is asked for again for itself, within the same deadline. Where the request fails, which it
        does as a whole, each is asked for itself as if there had been none.
        """
        most = self._config.concurrency
        if len(inquiries) > most:
            parts = [inquiries[first : first + most] for first in range(0, len(inquiries), most)]
            of_parts = await gather_or_cancel(self.ask_together(part, home, deadline_s) for part in parts)
            return [result for part in of_parts for result in part]
        if len(inquiries) < 2 or not all(server.accepts_batches for server in self._servers):
            return await self._ask_each(inquiries, home, deadline_s)
        firsts = [inquiry.questions[0] for inquiry in inquiries]
        request = _Request(len(firsts), lambda server: server.answers(firsts))
        try:
            async with self._free_slots(len(firsts)), asyncio.timeout(deadline_s) as deadline:
                answers = await self._answer(request, home, retries=0)
        except ServerError:
            return await self._ask_each(inquiries, home, deadline_s)
        except TimeoutError:
            if not deadline.expired():
                raise
            return [(_timeout(deadline_s), "")] * len(inquiries)
        results = await in_reply_thread(_all_read, inquiries, answers)
        left_s = (deadline.when() or 0.0) - asyncio.get_running_loop().time()
        again = [i for i, found in enumerate(results) if len(inquiries[i].questions) > 1 and _unreadable(*found)]
        self.counts["reasked"] += len(again)
        better = await gather_or_cancel(
            self.ask(inquiries[i].questions[1:], home, max(left_s, 0.0), inquiries[i].read) for i in again
        )
        for i, found in zip(again, better, strict=True):
            results[i] = found
        return results

    async def _ask_each(
        self, inquiries: Sequence[Inquiry[T]], home: int, deadline_s: float
    ) -> list[tuple[T | Abstained, str]]:
        return await gather_or_cancel(
            self.ask(inquiry.questions, home, deadline_s, inquiry.read) for inquiry in inquiries
        )

    @asynccontextmanager
    async def _free_slots(self, count: int) -> AsyncIterator[None]:
        """`count` of the slots, as soon as they are free and those that came before have theirs."""
        taken = 0
        try:
            async with self._next_in_queue:
                while taken < count:
                    await self._slots.acquire()
                    taken += 1
            yield
        finally:
            for _ in range(taken):
                self._slots.release()

    async def _read_in_turn(
        self, questions: Sequence[JudgeQuestion], home: int, read: Callable[[Answer], T | Abstained]
    ) -> tuple[T | Abstained, str]:
        for number, question in enumerate(questions):
            self.counts["reasked"] += number > 0
            answer = await self._answer(_single(question), home, self._config.retries)
            result, text = await in_reply_thread(_read, read, answer)
            if not isinstance(result, Abstained) or answer.refused:
                break
        return result, text

    async def _answer(self, request: _Request[A], home: int, retries: int) -> A:
        """The first answer to come; whatever happens, cancellation included, no request is left in flight."""
        if len(self._servers) == 1 or self._config.hedge_after_s is None:
            return await self._retried(request, home, retries)
        first = asyncio.ensure_future(self._retried(request, home, retries))
        running: set[asyncio.Future[A]] = {first}
        try:
            await asyncio.wait(running, timeout=self._config.hedge_after_s)
            if not first.done():
                running.add(asyncio.ensure_future(self._hedge(request, home + 1, retries)))
            return await self._first_answer(request, first, running)
        finally:
            await _cancelled(running)

    async def _alive(self) -> bool:
        """Whether at least one server is well."""
        checks = await asyncio.gather(*(server.health() for server in self._servers), return_exceptions=True)
        for check in checks:
            if isinstance(check, BaseException) and not isinstance(check, ServerError):
                raise check
        return None in checks

    async def _first_answer(self, request: _Request[A], first: asyncio.Future[A], running: set[asyncio.Future[A]]) -> A:
        pending = set(running)
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if not isinstance(task.exception(), ServerError):
                    self.counts["hedge-won"] += request.questions * (task is not first)
                    return task.result()
        # Both failed; the home server's own error is the one to tell.
        return first.result()

    async def _hedge(self, request: _Request[A], home: int, retries: int) -> A:
        # The queue is fair: while judgements wait for slots, no hedge takes one from them.
        async with self._free_slots(request.questions):
            self.counts["hedged"] += request.questions
            return await self._retried(request, home, retries)

    async def _retried(self, request: _Request[A], home: int, retries: int) -> A:
        """Each attempt goes to the next server, so that one that died costs its problems a pause and no more."""
        for attempt in range(retries + 1):
            if attempt:
                self.counts["retried"] += 1
                await asyncio.sleep(self._config.retry_pause_s * 2 ** (attempt - 1))
            self.counts["asked"] += request.questions
            try:
                return await request.send(self._servers[(home + attempt) % len(self._servers)])
            except RequestRefused:
                raise
            except ServerError as error:
                failure = error
        raise failure


def _single(question: JudgeQuestion) -> _Request[Answer]:
    return _Request(1, lambda server: server.answer(question))


def _timeout(deadline_s: float) -> Abstained:
    return Abstained("timeout", f"no answer within {deadline_s:g} s")


def _unreadable(result: Any, _: str) -> bool:
    return isinstance(result, Abstained) and result.reason != "refused"


def _all_read[T](inquiries: Sequence[Inquiry[T]], answers: Sequence[Answer]) -> list[tuple[T | Abstained, str]]:
    return [_read(inquiry.read, answer) for inquiry, answer in zip(inquiries, answers, strict=True)]


def _read[T](read: Callable[[Answer], T | Abstained], answer: Answer) -> tuple[T | Abstained, str]:
    """What `read` makes of an answer, and its text."""
    return Abstained("refused", answer.text) if answer.refused else read(answer), answer.text


async def _cancelled(tasks: Collection[asyncio.Future[Any]]) -> None:
    """Cancel the tasks and return when they have ended; their errors are of no interest any more."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
