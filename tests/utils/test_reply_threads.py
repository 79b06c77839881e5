"""In which threads replies of servers are read."""

import asyncio
import threading

from exprl_megatron.utils.reply_threads import LONG_REPLY, in_reply_thread


def test_short_replies_do_not_wait_for_long_ones():
    """All threads for long replies are busy, and more of these wait, until the short ones are read."""
    read = threading.Event()

    async def both() -> list[str]:
        long = [asyncio.ensure_future(in_reply_thread(read.wait, 20, size=LONG_REPLY)) for _ in range(8)]
        await asyncio.sleep(0)
        short = [await in_reply_thread(lambda: threading.current_thread().name, size=LONG_REPLY - 1) for _ in range(3)]
        assert not any(future.done() for future in long)
        read.set()
        assert all(await asyncio.gather(*long))
        return short

    assert all(name.startswith("replies") for name in asyncio.run(both()))
