"""Callers that are ready at the same time continue a few in each pass of the event loop, in order."""

import asyncio

from exprl_megatron.utils.loop_throttle import LoopThrottle


async def passes(each_pass: int, callers: int, cancelled: tuple[int, ...] = ()) -> list[list[int]]:
    """Which callers continued in each pass; those of `cancelled` are cancelled in the first."""
    shared, found = LoopThrottle(each_pass), []

    async def call(number: int) -> None:
        await shared.take()
        found[-1].append(number)

    tasks = [asyncio.create_task(call(number)) for number in range(callers)]
    for turn in range(callers + 3):
        found.append([])
        await asyncio.sleep(0)
        if not turn:
            for number in cancelled:
                tasks[number].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return [each for each in found if each]


def test_each_pass_lets_so_many_continue_in_their_order():
    found = asyncio.run(passes(3, 10))
    assert [number for each in found for number in each] == list(range(10))
    assert max(map(len, found)) <= 3
    assert asyncio.run(passes(16, 10)) == [list(range(10))]


def test_who_is_cancelled_takes_no_turn_of_another():
    found = asyncio.run(passes(1, 4, cancelled=(1, 2)))
    assert [number for each in found for number in each] == [0, 3]


def test_later_callers_find_new_turns():
    async def twice() -> int:
        shared = LoopThrottle(2)
        for _ in range(5):
            await asyncio.gather(*(shared.take() for _ in range(5)))
            await asyncio.sleep(0)
        return len(shared._waiting)

    assert asyncio.run(twice()) == 0


def test_fewer_continue_while_passes_take_long_and_more_again_afterwards():
    now = 0.0

    async def counted() -> list[int]:
        nonlocal now
        shared, found = LoopThrottle(16, 0.01, lambda: now), [0]

        async def call() -> None:
            await shared.take()
            found[-1] += 1

        tasks = [asyncio.create_task(call()) for _ in range(60)]
        for turn in range(40):
            await asyncio.sleep(0)
            now += 0.02 if turn < 8 else 0.001
            found.append(0)
        await asyncio.gather(*tasks)
        return [count for count in found if count]

    found = asyncio.run(counted())
    assert sum(found) == 60 and found[0] == 16
    slow = found[1 : found.index(1) + 1]
    assert slow == sorted(slow, reverse=True) and max(slow) <= 8
    assert max(found[found.index(1) :]) > 4
