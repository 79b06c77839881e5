"""Many calls that succeed or fail as one."""

import asyncio

import pytest

from exprl_megatron.utils.together import first_n, gather_or_cancel


def test_results_come_in_the_order_of_the_calls_whichever_is_first_to_end():
    async def after(turns):
        for _ in range(turns):
            await asyncio.sleep(0)
        return turns

    assert asyncio.run(gather_or_cancel(after(turns) for turns in (5, 1, 3))) == [5, 1, 3]
    assert asyncio.run(gather_or_cancel([])) == []


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
        await gather_or_cancel([wait(), fail()])

    with pytest.raises(ConnectionError, match="the server is dead"):
        asyncio.run(gather_or_cancel([wait(), within()]))
    assert ended == ["cancelled", "cancelled"]


def test_as_soon_as_enough_results_count_the_other_calls_are_cancelled():
    ended = []

    async def after(turns):
        try:
            for _ in range(turns):
                await asyncio.sleep(0)
            return turns
        except asyncio.CancelledError:
            ended.append(turns)
            raise

    calls = (5000, 3, 10, 6000, 20)
    assert asyncio.run(first_n((after(n) for n in calls), 2)) == [3, 10]
    assert sorted(ended) == [20, 5000, 6000]
    # What is through by then is kept, whether it counts or not.
    assert asyncio.run(first_n((after(n) for n in calls), 1, lambda n: n > 15)) == [3, 10, 20]
    # Where not enough count, all are waited for.
    assert asyncio.run(first_n((after(n) for n in (4, 2)), 1, lambda n: False)) == [4, 2]


def test_a_failure_before_enough_results_count_is_raised_as_it_is():
    async def fail():
        raise ConnectionError("the server is dead")

    async def wait():
        await asyncio.sleep(3600)

    with pytest.raises(ConnectionError, match="the server is dead"):
        asyncio.run(first_n([wait(), fail(), wait()], 2))
