"""Whose turn it is to ask a question that several may want to ask at the same time."""

import asyncio
import weakref

from exprl_megatron.judging.judgement import Judgement


class Turn:
    """One question that several may want to ask at the same time."""

    def __init__(self) -> None:
        self.judgement: Judgement | None = None
        """What became of it, where that is in the store."""
        self._taken: asyncio.Event | None = None

    def take(self) -> bool:
        """Whether nobody is asking; the caller is from now on, until `leave`."""
        if self._taken is not None:
            return False
        self._taken = asyncio.Event()
        return True

    def leave(self) -> None:
        """Let another one ask."""
        self._taken.set()
        self._taken = None

    async def come(self) -> None:
        """Return when the caller may ask."""
        while not self.take():
            await self._taken.wait()


class Turns:
    """The turns of questions by their keys, as long as anybody holds one."""

    def __init__(self) -> None:
        self._turns: weakref.WeakValueDictionary[str, Turn] = weakref.WeakValueDictionary()

    def of(self, key: str) -> Turn:
        """The turn of the question under `key`."""
        turn = self._turns.get(key) or Turn()
        self._turns[key] = turn
        return turn
