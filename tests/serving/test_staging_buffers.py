"""Two rounds of transfers are in flight, each in staging memory of its own, which is taken again only afterwards."""

import pytest
import torch

from exprl_megatron.serving import staging_buffers
from exprl_megatron.serving.staging_buffers import StagingBuffers, run_rounds


class Work:
    """One operation in flight."""

    def __init__(self, events, number):
        self.events, self.number = events, number

    def wait(self):
        self.events.append(("wait", self.number))


def carried_out(monkeypatch, count):
    """What happens in so many rounds of two operations each, in order."""
    events = []
    monkeypatch.setattr(
        staging_buffers.dist, "batch_isend_irecv", lambda operations: [Work(events, number) for number in operations]
    )

    def begin(slot, together):
        events.append(("begin", slot, together[0]))
        return together * 2

    run_rounds(([number] for number in range(count)), begin, lambda slot: events.append(("end", slot)))
    return events


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_every_round_is_started_waited_for_and_ended_once_in_its_slot(monkeypatch, count):
    events = carried_out(monkeypatch, count)
    assert [event for event in events if event[0] == "begin"] == [("begin", i % 2, i) for i in range(count)]
    assert [event for event in events if event[0] == "end"] == [("end", i % 2) for i in range(count)]
    assert [event[1] for event in events if event[0] == "wait"] == [i for i in range(count) for _ in range(2)]


def test_a_staging_buffer_is_taken_again_only_after_the_round_in_it_has_ended_and_two_rounds_are_in_flight(monkeypatch):
    in_flight, most = {}, 0
    for event in carried_out(monkeypatch, 6):
        if event[0] == "begin":
            assert event[1] not in in_flight
            in_flight[event[1]] = event[2]
            most = max(most, len(in_flight))
        if event[0] == "end":
            del in_flight[event[1]]
    assert most == 2 and in_flight == {}


def buffers(dtype=torch.float32):
    return StagingBuffers(dtype, torch.device("cpu"))


def test_parts_that_are_not_one_piece_are_staged_one_after_the_other():
    matrix = torch.arange(12.0).view(3, 4)
    of_two, of_columns = [matrix[0], matrix[2]], [matrix[:, :2]]
    pieces, copies = buffers().take(0, [of_two, of_columns])
    for part, place in copies:
        place.copy_(part)
    assert [piece.tolist() for piece in pieces] == [[0, 1, 2, 3, 8, 9, 10, 11], [0, 1, 4, 5, 8, 9]]
    assert pieces[0].data_ptr() + 8 * 4 == pieces[1].data_ptr()


def test_one_contiguous_part_is_sent_from_where_it_is():
    matrix = torch.arange(12.0).view(3, 4)
    (piece,), copies = buffers().take(0, [[matrix[1:]]])
    assert piece.data_ptr() == matrix[1:].data_ptr() and copies == []


def test_a_part_of_another_dtype_is_staged_in_the_staging_buffers():
    (piece,), ((part, place),) = buffers(torch.bfloat16).take(0, [[torch.ones(4)]])
    place.copy_(part)
    assert piece.dtype == torch.bfloat16 and piece.tolist() == [1.0] * 4


def test_staging_buffers_share_no_memory_and_each_has_its_own_again():
    staging, part = buffers(), torch.ones(4, 4)[:, :3]
    (first,), _ = staging.take(0, [[part]])
    (second,), _ = staging.take(1, [[part]])
    (third,), _ = staging.take(0, [[part[:2]]])
    size = 12 * 4
    assert abs(first.data_ptr() - second.data_ptr()) >= size
    assert third.data_ptr() == first.data_ptr()
