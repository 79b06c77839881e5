"""Coalesces equal questions: of several callers with the same question one sends it, the others wait for its answer.

Why not a caching decorator such as async-lru: it coalesces single calls, while here a caller acquires many questions
and sends those that no other caller has as one batch.
"""

import asyncio
import weakref

from exprl_megatron.judging.judgement import Judgement


class QuestionLock:
    """The lock of one question, with the judgement that its holder found."""

    def __init__(self) -> None:
        self.judgement: Judgement | None = None
        """The judgement, once it is in the store."""
        self._taken: asyncio.Event | None = None

    def try_acquire(self) -> bool:
        """Acquire the lock where it is free; returns whether the caller has it."""
        if self._taken is not None:
            return False
        self._taken = asyncio.Event()
        return True

    def release(self) -> None:
        """Release the lock, so that another caller may ask."""
        if self._taken is not None:
            self._taken.set()
        self._taken = None

    async def acquire(self) -> None:
        """Wait until the caller has the lock."""
        while self._taken is not None:
            await self._taken.wait()
        self.try_acquire()


class QuestionLocks:
    """Locks of questions by their keys; a lock exists as long as a caller refers to it."""

    def __init__(self) -> None:
        self._locks: weakref.WeakValueDictionary[str, QuestionLock] = weakref.WeakValueDictionary()

    def of(self, key: str) -> QuestionLock:
        """Return the lock of the question under `key`."""
        lock = self._locks.get(key) or QuestionLock()
        self._locks[key] = lock
        return lock
