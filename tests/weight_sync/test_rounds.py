"""In which order rank 0 gathers and sends the rounds of a sync, and what the servers and the other ranks hear."""

import asyncio
import threading
from contextlib import contextmanager

import pytest

from exprl_megatron.errors import ServerError
from exprl_megatron.weight_sync.rounds import push_rounds


class Signals:
    """Rank 0's signals to the other ranks; keeps them among the events."""

    def __init__(self, events):
        self.events = events

    def signal(self, payload=None):
        self.events.append("signal")

    @contextmanager
    def abort_on_error(self):
        try:
            yield
        except BaseException:
            self.events.append("abort")
            raise


class Server:
    """One that notes the beginning and the end of an update."""

    def __init__(self, events):
        self.events = events

    async def begin_weight_update(self, deadline_s):
        self.events.append(f"begin {deadline_s:g}")

    async def end_weight_update(self, deadline_s):
        self.events.append(f"end {deadline_s:g}")


def pushed(count, *, servers=1, fails_at=None):
    """The events of so many rounds; a round is gathered while the one before is sent, wherever that is allowed."""
    events, gathered = [], {number: threading.Event() for number in range(count)}

    def gather(number):
        events.append(f"gather {number}")
        gathered[number].set()
        return f"bucket {number}"

    async def send(number, bucket):
        assert bucket == f"bucket {number}"
        events.append(f"send {number}")
        if number == fails_at:
            raise ServerError("refused")
        if number + 1 < count and fails_at is None:
            # Ends only once the next round is gathered: the two must overlap.
            await asyncio.to_thread(gathered[number + 1].wait, 60)
        events.append(f"sent {number}")

    async def run():
        clients = [Server(events) for _ in range(servers)]
        await push_rounds(count, Signals(events), clients, gather, send, 5.0)

    try:
        asyncio.run(run())
    except ServerError:
        events.append("raised")
    return events


def test_every_round_is_signalled_gathered_and_sent_between_the_beginning_and_the_end_on_all_servers():
    events = pushed(3, servers=2)
    assert events[:2] == ["begin 5"] * 2 and events[-3:] == ["end 5"] * 2 + ["signal"]
    assert events.count("signal") == 3 + 1, "one before each round and one at the end"
    for number in range(3):
        assert events.index(f"gather {number}") < events.index(f"send {number}") < events.index(f"sent {number}")


def test_a_round_is_gathered_while_the_one_before_is_sent_but_not_before_the_one_before_that_was_taken():
    events = pushed(4)
    for number in range(3):
        assert events.index(f"gather {number + 1}") < events.index(f"sent {number}"), "they overlap"
    for number in range(2):
        assert events.index(f"sent {number}") < events.index(f"gather {number + 2}"), "at most two buckets exist"
    for number in range(3):
        assert events.index(f"sent {number}") < events.index(f"send {number + 1}"), "servers take one at a time"


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_where_a_server_refuses_a_round_the_update_is_not_ended_and_the_other_ranks_are_notified(fails_at):
    events = pushed(3, fails_at=fails_at)
    assert events[-2:] == ["abort", "raised"]
    assert "end 5" not in events and f"send {fails_at + 1}" not in events
