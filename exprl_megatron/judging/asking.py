"""Sends questions to several judge servers: retries with backoff, hedged requests, no request left in flight.

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

# A question's own deadline passes before that of its request: it is an abstention, and the request's is an error.
REQUEST_GRACE_S = 30.0

_UNHEALTHY_PAUSE_S = 1.0

T = TypeVar("T")
A = TypeVar("A")


@dataclass(frozen=True)
class Inquiry[T]:
    """A question, and the questions to send in turn where an answer cannot be parsed."""

    questions: Sequence[JudgeQuestion]
    parse: Callable[[Answer], T | Abstained]


@dataclass(frozen=True)
class _Request[A]:
    """One request with one or more questions."""

    questions: int
    send: Callable[[Answerer], Awaitable[A]]


class JudgePool:
    """Clients of the judge's servers; use it within one event loop.

    At most `config.concurrency` questions are in flight. `counts` has the numbers of questions that were `asked`
    (sent), `reasked`, `retried`, `hedged` and answered first by the hedge (`hedge-won`).
    """

    def __init__(self, config: JudgeConfig, servers: Sequence[Answerer], counts: Counter[str]):
        self._config = config
        self._servers = servers
        self.counts = counts
        self._slots = asyncio.Semaphore(config.concurrency)
        self._queue_lock = asyncio.Lock()

    async def ask(
        self, questions: Iterable[JudgeQuestion], home: int, deadline_s: float, parse: Callable[[Answer], T | Abstained]
    ) -> tuple[T | Abstained, str]:
        """Send the questions in turn until an answer can be parsed.

        Without any answer the result is an abstention: `timeout` after `deadline_s`, `refused`, or `server-error` where
        the question fails repeatedly although a server is healthy. While no server is healthy the question is repeated.

        Args:
            questions: the question, and its repetitions for answers that cannot be parsed.
            home: number of the preferred server, modulo the number of servers.
            deadline_s: seconds for all questions together, counted from the moment when a slot is free.
            parse: returns the result, or an abstention where the answer cannot be parsed.

        Returns:
            The parsed result (of the last answer, if none could be parsed), and the text of the last answer.

        Raises:
            ServerError: no server is healthy when the deadline has passed.
        """
        down: ServerError | None = None
        questions = list(questions)
        try:
            async with self._reserve_slots(1), asyncio.timeout(deadline_s) as deadline:
                while True:
                    try:
                        return await self._ask_until_parsed(questions, home, parse)
                    except RequestRefused as error:
                        return Abstained("refused", error.said), ""
                    except ServerError as error:
                        down = error
                        if await self._any_healthy():
                            return Abstained("server-error", str(error).partition("\n")[0]), ""
                    await asyncio.sleep(_UNHEALTHY_PAUSE_S)
        except TimeoutError:
            if not deadline.expired():
                raise
        if down is not None and not await self._any_healthy():
            raise down
        return _timeout(deadline_s), ""

    async def ask_together(
        self, inquiries: Sequence[Inquiry[T]], home: int, deadline_s: float
    ) -> list[tuple[T | Abstained, str]]:
        """Send the first questions of all inquiries in one request, where the servers accept batches.

        An answer that cannot be parsed is followed by that inquiry's further questions, within the same deadline. Where
        the batch fails, each inquiry is sent by itself.

        Args:
            inquiries: the inquiries, about texts of one problem.
            home: number of the preferred server, modulo the number of servers.
            deadline_s: seconds for each inquiry.

        Returns:
            The result of `ask` for each inquiry, in the same order.

        Raises:
            ServerError: no server is healthy when the deadline has passed.
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
            async with self._reserve_slots(len(firsts)), asyncio.timeout(deadline_s) as deadline:
                answers = await self._answer(request, home, retries=0)
        except ServerError:
            return await self._ask_each(inquiries, home, deadline_s)
        except TimeoutError:
            if not deadline.expired():
                raise
            return [(_timeout(deadline_s), "")] * len(inquiries)
        results = await in_reply_thread(_parse_all, inquiries, answers)
        left_s = (deadline.when() or 0.0) - asyncio.get_running_loop().time()
        again = [i for i, found in enumerate(results) if len(inquiries[i].questions) > 1 and _unreadable(*found)]
        self.counts["reasked"] += len(again)
        better = await gather_or_cancel(
            self.ask(inquiries[i].questions[1:], home, max(left_s, 0.0), inquiries[i].parse) for i in again
        )
        for i, found in zip(again, better, strict=True):
            results[i] = found
        return results

    async def _ask_each(
        self, inquiries: Sequence[Inquiry[T]], home: int, deadline_s: float
    ) -> list[tuple[T | Abstained, str]]:
        return await gather_or_cancel(
            self.ask(inquiry.questions, home, deadline_s, inquiry.parse) for inquiry in inquiries
        )

    @asynccontextmanager
    async def _reserve_slots(self, count: int) -> AsyncIterator[None]:
        """Reserve `count` slots; callers are served in the order in which they came."""
        taken = 0
        try:
            async with self._queue_lock:
                while taken < count:
                    await self._slots.acquire()
                    taken += 1
            yield
        finally:
            for _ in range(taken):
                self._slots.release()

    async def _ask_until_parsed(
        self, questions: Sequence[JudgeQuestion], home: int, parse: Callable[[Answer], T | Abstained]
    ) -> tuple[T | Abstained, str]:
        for number, question in enumerate(questions):
            self.counts["reasked"] += number > 0
            answer = await self._answer(_single(question), home, self._config.retries)
            result, text = await in_reply_thread(_parse, parse, answer)
            if not isinstance(result, Abstained) or answer.refused:
                break
        return result, text

    async def _answer(self, request: _Request[A], home: int, retries: int) -> A:
        """Return the first answer that arrives; no request is left in flight, even if the caller is canceled."""
        if len(self._servers) == 1 or self._config.hedge_after_s is None:
            return await self._send_with_retries(request, home, retries)
        first = asyncio.ensure_future(self._send_with_retries(request, home, retries))
        running: set[asyncio.Future[A]] = {first}
        try:
            await asyncio.wait(running, timeout=self._config.hedge_after_s)
            if not first.done():
                running.add(asyncio.ensure_future(self._hedge(request, home + 1, retries)))
            return await self._first_answer(request, first, running)
        finally:
            await _cancel_all(running)

    async def _any_healthy(self) -> bool:
        """Return whether at least one server is healthy."""
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
        # Both failed: report the error of the preferred server.
        return first.result()

    async def _hedge(self, request: _Request[A], home: int, retries: int) -> A:
        # The queue is fair: a hedge takes no slot from a judgement that waits for one.
        async with self._reserve_slots(request.questions):
            self.counts["hedged"] += request.questions
            return await self._send_with_retries(request, home, retries)

    async def _send_with_retries(self, request: _Request[A], home: int, retries: int) -> A:
        """Send the request, each attempt to the next server, so that a dead server costs only one pause."""
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


def _parse_all[T](inquiries: Sequence[Inquiry[T]], answers: Sequence[Answer]) -> list[tuple[T | Abstained, str]]:
    return [_parse(inquiry.parse, answer) for inquiry, answer in zip(inquiries, answers, strict=True)]


def _parse[T](parse: Callable[[Answer], T | Abstained], answer: Answer) -> tuple[T | Abstained, str]:
    """Parse an answer; returns the result and the answer's text."""
    return Abstained("refused", answer.text) if answer.refused else parse(answer), answer.text


async def _cancel_all(tasks: Collection[asyncio.Future[Any]]) -> None:
    """Cancel the tasks and wait until they have ended; their exceptions are ignored."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
