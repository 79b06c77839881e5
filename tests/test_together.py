"""Many calls that succeed or fail as one."""

import asyncio

import pytest

from exprl_megatron.together import together


def test_results_come_in_the_order_of_the_calls_whichever_is_first_to_end():
    async def after(turns):
        for _ in range(turns):
            await asyncio.sleep(0)
        return turns

    assert asyncio.run(together(after(turns) for turns in (5, 1, 3))) == [5, 1, 3]
    assert asyncio.run(together([])) == []


def test_the_first_failure_cancels_everything_else_and_is_raised_as_it_is():
    ended = []

    async def wait():
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append("cancelled")

    async def fail():
        raise ConnectionError("the server is dead")

    async def within():
        await together([wait(), fail()])

    with pytest.raises(ConnectionError, match="the server is dead"):
        asyncio.run(together([wait(), within()]))
    assert ended == ["cancelled", "cancelled"]
