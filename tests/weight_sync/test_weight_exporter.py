"""Buckets on their way out: who fills which message, in which memory, and when that memory is used again."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from exprl_megatron.config.policy import Layout
from exprl_megatron.models import fp8_blocks as blocks
from exprl_megatron.weight_sync import weight_exporter as module
from exprl_megatron.weight_sync.messages import Message, TensorSlot
from exprl_megatron.weight_sync.weight_exporter import FilledBucket, WeightExporter, forward_along, quantize_into


def message(stage, size, name="w"):
    parameter = SimpleNamespace(name=name, hf_names=(name,))
    return Message(stage, (parameter,), (TensorSlot(name, "float32", (size,), 0),))


class Gatherer:
    """Fills every tensor with the number of the call, and keeps for which rank it was asked."""

    dtype = torch.float32

    def __init__(self):
        self.asked = []

    def collect(self, parameter, root, into):
        self.asked.append((parameter.name, root, into is not None))
        for tensor in into or ():
            tensor.fill_(len(self.asked))


def made(rounds, rank=0, layout=None, source_ranks=None, check=None):
    out = WeightExporter.__new__(WeightExporter)
    out.gatherer, out.rounds = Gatherer(), rounds
    out._world = SimpleNamespace(rank=rank, layout=layout or Layout(pp=2), device=torch.device("cpu"))
    out._source_ranks, out._check, out._buffers, out._checks = source_ranks, check, [None, None], []
    out._allocate = lambda size: torch.full((size,), 99, dtype=torch.uint8)
    out._checker = ThreadPoolExecutor(1)
    out.gather_s = out.quantize_s = 0.0
    out._gathered = 0
    return out


ROUNDS = [(message(0, 3, "a"), message(1, 2, "x")), (message(0, 4, "b"), message(1, 5, "y")), (message(1, 1, "z"),)]


@pytest.mark.parametrize(
    ("rank", "filled"), [(0, ["a", "b", None]), (1, ["x", "y", "z"])], ids=["first stage", "second stage"]
)
def test_each_stages_messages_are_filled_on_its_first_rank_alone(rank, filled):
    out = made(ROUNDS, rank)
    found = [out.gather(number) for number in range(3)]
    assert [one and one.message.parameters[0].name for one in found] == filled
    own = [(name, root, fills) for name, root, fills in out.gatherer.asked if fills]
    assert own == [(name, rank, True) for name in filled if name is not None]
    others = [(name, root) for name, root, fills in out.gatherer.asked if not fills]
    assert all(root == 1 - rank for _, root in others) and len(others) == 5 - len(own)


def test_two_buffers_of_the_largest_own_message_take_turns():
    out = made(ROUNDS, rank=1)
    first, second, third = (out.gather(number).data for number in range(3))
    assert first.data_ptr() == third.data_ptr() != second.data_ptr()
    assert [len(first), len(second), len(third)] == [8, 20, 4]
    assert [len(buffer) for buffer in out._buffers] == [20, 20]


def test_a_buffer_is_filled_again_only_after_its_message_was_checked():
    may_check, seen = threading.Event(), []

    def check(bucket):
        may_check.wait(60)
        seen.append([(name, tensor.tolist()) for name, tensor in bucket])

    out = made([(message(0, 1, name),) for name in "abcd"], layout=Layout(), check=check)
    out.gather(0)
    out.gather(1)
    threading.Timer(0.05, may_check.set).start()
    # Takes the memory of the first, which must have been looked at by then.
    out.gather(2)
    assert seen[0] == [("a", [1.0])]
    out.gather(3)
    out.wait_checks()
    assert seen == [[(name, [float(number)])] for number, name in enumerate("abcd", 1)]


@pytest.mark.parametrize(("rank", "checks"), [(0, True), (1, False), (2, False), (3, False)])
def test_of_all_ranks_that_get_a_message_the_first_one_checks_it(monkeypatch, rank, checks):
    monkeypatch.setattr(module, "forward_along", lambda data, chain, rank: None)
    names = []
    chains = ((0, 1), (2, 3))
    out = made([(message(0, 1, "a"),)], rank, Layout(dp=4), chains, lambda bucket: names.extend(n for n, _ in bucket))
    assert out.gather(0) is not None
    out.wait_checks()
    assert names == (["a"] if checks else [])


def test_rounds_that_a_transport_had_no_need_of_are_gathered_for_the_check_alone():
    names = []
    out = made([(message(0, 1, name),) for name in "abc"], layout=Layout(), check=lambda b: names.append(b[0][0]))
    out.gather(0)
    out.drain()
    out.wait_checks()
    assert names == ["a", "b", "c"]
    unchecked = made([(message(0, 1, name),) for name in "abc"], layout=Layout())
    unchecked.drain()
    assert unchecked.gatherer.asked == []


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_chain_hands_every_piece_on_in_order(monkeypatch, place):
    monkeypatch.setattr(module, "_FORWARDED", 4)
    events, data = [], torch.arange(10, dtype=torch.uint8)
    for name, other in (("recv", "src"), ("send", "dst")):
        monkeypatch.setattr(
            module.dist,
            name,
            lambda piece, *, name=name, other=other, **where: events.append((name, where[other], piece.tolist())),
        )
    chain = (5, 2, 7)
    forward_along(data, chain, chain[place])
    pieces = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    expected = []
    for piece in pieces:
        expected += [("recv", chain[place - 1], piece)] if place > 0 else []
        expected += [("send", chain[place + 1], piece)] if place < 2 else []
    assert events == expected


def test_rows_are_quantized_few_at_a_time_as_all_at_once(monkeypatch):
    weight = torch.randn(300, 130, generator=torch.Generator().manual_seed(0))
    values, scales = blocks.quantize(weight)
    monkeypatch.setattr(module, "_BLOCKS_AT_ONCE", 1)
    found = torch.empty(300, 130, dtype=torch.float8_e4m3fn), torch.empty(3, 2)
    quantize_into(weight, *found)
    assert torch.equal(found[0].float(), values.float()) and torch.equal(found[1], scales)


def test_a_messages_tensors_are_views_of_its_bytes():
    slots = (TensorSlot("a", "float32", (1, 2), 0), TensorSlot("b", "bfloat16", (3,), 8))
    filled = FilledBucket(Message(0, (), slots), torch.zeros(14, dtype=torch.uint8))
    (_, first), (_, second) = filled.named()
    second.fill_(1.0)
    assert (first.shape, second.dtype) == ((1, 2), torch.bfloat16)
    assert filled.data[8:].view(torch.bfloat16).tolist() == [1.0] * 3 and first.tolist() == [[0.0, 0.0]]
