"""The lag of an event loop as it is measured."""

import asyncio
import sys
import threading
import time

from exprl_megatron.training.loop_lag import HOST_THREADS, INTERVAL_S, LoopLag


def test_a_stall_is_measured_and_taken_once():
    async def stalled():
        lag = LoopLag()
        lag.start()
        await asyncio.sleep(3 * INTERVAL_S)
        time.sleep(0.2)
        await asyncio.sleep(3 * INTERVAL_S)
        first, second = lag.take(), lag.take()
        lag.stop()
        return first, second

    first, second = asyncio.run(stalled())
    assert first >= 0.2 - INTERVAL_S
    assert second == 0.0


def test_after_the_stop_nothing_continues():
    async def stopped():
        lag = LoopLag()
        lag.start()
        lag.stop()
        await asyncio.sleep(0)
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(stopped()) == set()
    LoopLag().stop()


def test_few_threads_work_beside_the_loop():
    names, together = set(), threading.Barrier(HOST_THREADS)

    def work():
        names.add(threading.current_thread().name)
        together.wait(120)

    async def many():
        lag = LoopLag()
        lag.start()
        await asyncio.gather(*(asyncio.to_thread(work) for _ in range(4 * HOST_THREADS)))
        lag.stop()

    asyncio.run(many())
    assert len(names) == HOST_THREADS and all(name.startswith("host-work") for name in names)


def test_the_loop_waits_for_each_other_thread_for_a_millisecond_at_most():
    async def started() -> float:
        lag = LoopLag()
        lag.start()
        lag.stop()
        return sys.getswitchinterval()

    before = sys.getswitchinterval()
    try:
        assert asyncio.run(started()) <= 0.001
    finally:
        sys.setswitchinterval(before)
