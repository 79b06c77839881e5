import math
import random

import pytest
from helpers.operations import instructions

from exprl_megatron.config.policy import Layout, PolicyConfig
from exprl_megatron.policy.packing import PackingShape, padded, padding_share, plan_micro_batches, shape_of

PADDED = PackingShape(packed=False)
PACKED = PackingShape(packed=True)


def work_of(lengths: list[int], parity: float) -> list[float]:
    """Tokens, and attention's share that grows with their square: as much again at `parity` tokens."""
    return [length * (1 + length / parity) for length in lengths]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("group", [1, 4])
def test_every_sequence_is_in_one_place_and_no_micro_batch_is_over_budget(packed, ranks, group):
    lengths = [random.Random(number).randint(1, 60) for number in range(50)]
    shape = PackingShape(packed, sequence=4, row=8)
    plan = plan_micro_batches(lengths, ranks, 100, shape, group, work=work_of(lengths, 40))
    assert sorted(i for micros in plan for rows in micros for i in rows) == list(range(50))
    assert len({len(micros) for micros in plan}) == 1
    assert len(plan[0]) % group == 0
    for rows in (rows for micros in plan for rows in micros if rows):
        assert sum(shape.with_padding([lengths[i] for i in rows])) <= 100


@pytest.mark.parametrize("shape", [PADDED, PACKED])
def test_ranks_get_like_work(shape):
    plan = plan_micro_batches([40, 30, 20, 10], 2, 1, shape)
    assert [sorted(i for rows in micros for i in rows) for micros in plan] == [[0, 3], [1, 2]]


def test_attention_makes_a_long_sequence_count_for_more():
    lengths = [100, *[10] * 10]
    by_tokens = plan_micro_batches(lengths, 2, 1000, PACKED)
    by_work = plan_micro_batches(lengths, 2, 1000, PACKED, work=work_of(lengths, 100))
    assert [sum(map(len, micros)) for micros in by_tokens] == [1, 10]
    # 100 tokens at 2 each against ten times 10 at 1.1 each.
    assert [sum(map(len, micros)) for micros in by_work] == [1, 10]
    lengths = [100, *[10] * 30]
    work = [
        sum(lengths[i] * (1 + lengths[i] / 100) for rows in micros for i in rows)
        for micros in plan_micro_batches(lengths, 2, 1000, PACKED, work=work_of(lengths, 100))
    ]
    assert abs(work[0] - work[1]) <= 11


@pytest.mark.parametrize("seed", range(5))
def test_packed_micro_batches_are_alike_and_few(seed):
    """On long-tailed lengths: work within 5 % over ranks and 15 % over micro-batches, one more of these than needed."""
    draw = random.Random(seed)
    lengths = [min(4096, int(math.exp(draw.gauss(6, 0.9)))) for _ in range(512)]
    plan = plan_micro_batches(lengths, 8, 8192, PACKED, work=work_of(lengths, 20000))

    def work(rows):
        return sum(lengths[i] * (1 + lengths[i] / 20000) for i in rows)

    ranks = [sum(map(work, micros)) for micros in plan]
    micros = [work(rows) for micros in plan for rows in micros]
    assert max(ranks) <= 1.05 * min(ranks)
    assert max(micros) <= 1.15 * min(micros)
    assert len(plan[0]) <= math.ceil(sum(lengths) / 8 / 8192) + 1


def long_tailed(count: int, seed: int = 0, sigma: float = 0.6, longest: int = 8192) -> list[int]:
    """Lengths of about 2,048 tokens."""
    draw = random.Random(seed)
    return [min(longest, 64 + int(math.exp(draw.gauss(7.4, sigma)))) for _ in range(count)]


def plain_packing(lengths: list[int], budget: int, shape: PackingShape, parity: float) -> list[list[int]]:
    """One rank's micro-batches by the definition: to the least loaded with room, with the first count that will do."""
    work = work_of(lengths, parity)
    order = sorted(range(len(lengths)), key=lambda index: (-work[index], index))
    sizes = [padded(length, shape.sequence) for length in lengths]
    count = math.ceil(sum(min(size, budget) for size in sizes) / budget)
    while True:
        micros = [[] for _ in range(count)]
        for index in order:
            tokens = [sum(sizes[other] for other in micro) for micro in micros]
            room = [
                not micro or padded(n + sizes[index], shape.row) <= budget
                for micro, n in zip(micros, tokens, strict=True)
            ]
            fits = [micro for micro, fit in zip(micros, room, strict=True) if fit]
            if not fits:
                break
            min(fits, key=lambda micro: sum(work[other] for other in micro)).append(index)
        else:
            return micros
        count += 1


@pytest.mark.parametrize(
    "shape", [PackingShape(True), PackingShape(True, sequence=4, row=256), PackingShape(True, sequence=6, row=3000)]
)
@pytest.mark.parametrize(("sigma", "budget"), [(0.3, 8192), (0.6, 8192), (1.2, 8192), (0.6, 20480), (0.6, 2000)])
def test_packing_is_that_of_its_definition(shape, sigma, budget):
    for seed in range(3):
        lengths = long_tailed(90, seed, sigma)
        (found,) = plan_micro_batches(lengths, 1, budget, shape, work=work_of(lengths, 1e5))
        assert found == plain_packing(lengths, budget, shape, 1e5)


@pytest.mark.parametrize(("ranks", "shape"), [(1, PackingShape(True, sequence=4, row=256)), (8, PADDED)])
def test_planning_grows_like_n_log_n(ranks, shape):
    # The search for the number of micro-batches has its full length from 512 of them on.
    few, many = 2048, 8192

    def planned(count):
        lengths = long_tailed(count)
        plan_micro_batches(lengths, ranks, 8192, shape, work=work_of(lengths, 1e5))

    cost = [instructions(lambda n=n: planned(n)) for n in (few, many)]
    assert cost[1] <= 1.2 * cost[0] * (many * math.log(many)) / (few * math.log(few))


def test_a_sequence_over_budget_is_alone():
    assert plan_micro_batches([5, 200, 4], 1, 10, PADDED) == [[[1], [0, 2]]]
    assert sorted(plan_micro_batches([5, 200, 4], 1, 10, PACKED)[0]) == [[0, 2], [1]]


@pytest.mark.parametrize("shape", [PADDED, PACKED])
def test_ranks_without_work_get_filler(shape):
    assert plan_micro_batches([7], 3, 10, shape, group=2) == [[[0], []], [[], []], [[], []]]


def test_share_of_padding_before_and_after():
    lengths = [9, 5, 2]
    plan = [[[0, 1, 2]]]
    assert padding_share(lengths, plan, PackingShape(packed=False, row=2)) == pytest.approx(1 - 16 / 30)
    assert padding_share(lengths, plan, PackingShape(packed=True, sequence=2, row=4)) == pytest.approx(1 - 16 / 20)
    assert padding_share([3], [[[0]], [[]]], PackingShape(packed=True, sequence=4, row=4)) == pytest.approx(1 - 3 / 8)


def test_the_last_sequence_of_a_packed_row_takes_the_rows_padding():
    assert PackingShape(packed=True, sequence=4, row=16).with_padding([3, 5]) == [4, 12]
    assert PackingShape(packed=False, row=8).with_padding([3, 5]) == [8, 8]


@pytest.mark.parametrize(
    ("layout", "precision", "cuda", "sequence", "row"),
    [
        (Layout(), "fp32", False, 1, 1),
        (Layout(cp=4), "fp32", False, 8, 8),
        (Layout(tp=2, sequence_parallel=True), "fp32", False, 1, 2),
        (Layout(tp=4, cp=2, sequence_parallel=True), "fp32", False, 4, 8),
        (Layout(cp=3), "bf16", True, 6, 192),
        (Layout(tp=2), "fp8-blockwise", True, 1, 128),
        (Layout(tp=2, cp=2, sequence_parallel=True), "fp8-blockwise", True, 4, 512),
    ],
)
def test_lengths_are_round_where_layout_or_kernels_ask_for_it(layout, precision, cuda, sequence, row):
    shape = shape_of(PolicyConfig(model="m", layout=layout, precision=precision), cuda)
    assert (shape.packed, shape.sequence, shape.row, shape.cp) == (True, sequence, row, layout.cp)


def test_padding_rounds_up():
    assert [padded(n, 4) for n in (1, 4, 5)] == [4, 4, 8]
