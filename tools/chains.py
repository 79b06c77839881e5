"""Chains of small sums: the problems of the miniature experiment, and the texts that teach it.

A chain starts at a number and applies `+`, `-` and `*` with small operands, modulo 100. Every text is a
row of words parted by single blanks, and each word is one token (`VOCABULARY`):

    problem       Q 7 s1 + 5 s2 * 3 s3 - 4 A
    trace         ### s1 7 + 5 = 12 ### s2 12 * 3 = 36 ### s3 36 - 4 = 32 ans 32
    reference     s2 36 ans 32
    hinted        Q 7 s1 + 5 s2 * 3 s3 - 4 A REF s2 36 ans 32 A
    judge reads   <problem> REF <reference> TR <trace, or the beginning of one> JUDGE
    judge writes  s2 36 40 bad ans 32 36 bad Score: 1
    or it reads   <problem> REF <reference> TR <one segment of a trace> STEP
    and writes    s2 36 40 bad Score: 1

References are terse, as people write solutions: the value of every second step (a checkpoint) and the answer. Who
imitates them has to leap over sums that the policy's own traces write out. Steps have names (`s1`, `s2`, ...) in all
texts, so that a small transformer finds a step by its name instead of by counting. For each checkpoint the judge
writes the reference's value, the trace's value and whether they agree; it stops at the first where they do not,
compares the answers and scores. Everything here is a pure function of its arguments and of the `Random` it is
given."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import batched
from random import Random

LONGEST = 7  # steps in a chain
LONG = (5, 6, 7)  # steps of the training and held-out problems
OPERANDS = range(2, 6)
MODULUS = 100
SPECIAL_WORDS = ("<pad>", "<eos>", "<unk>")
WORDS = ("Q", "A", "###", "=", "ans", "+", "-", "*", "REF", "TR", "JUDGE", "STEP", "ok", "bad", "none", "Score:")
STEP_NAMES = tuple(f"s{i}" for i in range(1, LONGEST + 1))
VOCABULARY = (*SPECIAL_WORDS, *WORDS, *STEP_NAMES, *map(str, range(MODULUS)))
GOES_ON, HINTED_GOES_ON = 0.20, 0.45  # probability that the base policy writes one more step


@dataclass(frozen=True)
class Chain:
    """A problem: a first number, and the signs and operands to apply to it, in order."""

    start: int
    operations: tuple[tuple[str, int], ...]


def chain_problem(rng: Random, steps: int) -> Chain:
    start = rng.randrange(MODULUS)
    return Chain(start, tuple((rng.choice("+-*"), rng.choice(OPERANDS)) for _ in range(steps)))


def apply(value: int, sign: str, operand: int) -> int:
    return {"+": value + operand, "-": value - operand, "*": value * operand}[sign] % MODULUS


def values(chain: Chain, slips: dict[int, int] | None = None) -> list[int]:
    """Return the value after each step. `slips` maps steps, counted from 0, to what is wrongly added there; the steps
    that follow continue from the wrong value."""
    found = [chain.start]
    for index, (sign, operand) in enumerate(chain.operations):
        found.append((apply(found[-1], sign, operand) + (slips or {}).get(index, 0)) % MODULUS)
    return found[1:]


def problem_text(chain: Chain) -> str:
    steps = [f"s{i} {sign} {operand}" for i, (sign, operand) in enumerate(chain.operations, 1)]
    return " ".join(["Q", str(chain.start), *steps, "A"])


def solution_text(chain: Chain, written: list[int], answer: int | None) -> str:
    """Return the steps whose values are `written`, which may be fewer than the chain has, then the answer."""
    before = [chain.start, *written]
    steps = zip(before, chain.operations, written, strict=False)
    parts = [f"### s{i} {start} {sign} {operand} = {end}" for i, (start, (sign, operand), end) in enumerate(steps, 1)]
    return " ".join(parts if answer is None else [*parts, f"ans {answer}"])


def worked_text(chain: Chain) -> str:
    """Return the whole trace, as a faultless policy writes it."""
    return solution_text(chain, values(chain), values(chain)[-1])


def terse_text(written: list[int]) -> str:
    """Return a reference that follows the values `written`: the checkpoints s2, s4, ... and the answer."""
    checkpoints = [f"s{i} {value}" for i, value in enumerate(written, 1) if i % 2 == 0]
    return " ".join([*checkpoints, f"ans {written[-1]}"])


def reference_text(chain: Chain) -> str:
    return terse_text(values(chain))


def problem_with_reference_text(problem: str, reference: str) -> str:
    """Return the problem with its reference as a hint; the base policy has learnt to read this too."""
    return f"{problem} REF {reference} A"


def answer_text(chain: Chain) -> str:
    return str(values(chain)[-1])


def step_values(solution: str) -> dict[str, str]:
    """`### s2 12 * 3 = 36` gives `{"s2": "36"}`. Of steps with one name the first counts; a step without a value,
    because the trace was cut there, does not."""
    found: dict[str, str] = {}
    for segment in solution.split("###")[1:]:
        step, _, after = segment.partition("=")
        if step.split() and after.split():
            found.setdefault(step.split()[0], after.split()[0])
    return found


def checkpoints(reference: str) -> dict[str, str]:
    """`s2 36 s4 50 ans 41` gives `{"s2": "36", "s4": "50"}`."""
    return dict(batched(reference.partition("ans ")[0].split(), 2))


def stated_answer(solution: str) -> str | None:
    _, _, after = solution.partition("ans ")
    return after.split()[0] if after.split() else None


def leading_checkpoints(trace: str, reference: str) -> int:
    """Return how many of the reference's checkpoints the trace has right before the first that it has not. One is right
    when the trace has a step of that name with that value."""
    written = step_values(trace)
    agree = [written.get(name) == value for name, value in checkpoints(reference).items()]
    return [*agree, False].index(False)


def expected_score(trace: str, reference: str) -> int:
    """Return what a trace, or the beginning of one, is worth. 5: the answer and all checkpoints are right. 4: the
    answer is right, but not all checkpoints. Below that the answer is wrong or missing, and the share of leading right
    checkpoints decides: 3 from 60 %, 2 from 25 %, else 1. So a score of 4 or more says exactly that the final answer is
    right.
    """
    right, wanted = leading_checkpoints(trace, reference), len(checkpoints(reference))
    if stated_answer(trace) == stated_answer(reference):
        return 5 if right == wanted else 4
    share = right / wanted if wanted else 0.0
    return 3 if share >= 0.6 else 2 if share >= 0.25 else 1


def expected_step_score(segment: str, reference: str) -> int:
    """Return what one segment is worth alone. 5 or 1: what it states, which is the answer or else a checkpoint, agrees
    with the reference or does not. 3: the reference says nothing about it.
    """
    compared = _step_comparison(segment, reference)
    return {"ok": 5, "bad": 1}.get(compared[-1], 1 if len(compared) == 3 else 3)


def judge_prompt(problem: str, reference: str, trace: str) -> str:
    return " ".join(f"{problem} REF {reference} TR {trace} JUDGE".split())


def step_prompt(problem: str, reference: str, segment: str) -> str:
    return " ".join(f"{problem} REF {reference} TR {segment} STEP".split())


def judge_completion(reference: str, trace: str, *, past_errors: bool = False) -> str:
    """Return what the judge should write. With `past_errors` it compares all checkpoints that the trace has: the early
    rows of its lessons do so, because it learns where to look from steps that differ.
    """
    written, words = step_values(trace), []
    for name, value in checkpoints(reference).items():
        other = written.get(name)
        words += [name, value, *_compared(value, other)]
        if other is None or (other != value and not past_errors):
            break
    answer = stated_answer(reference)
    words += ["ans", answer, *_compared(answer, stated_answer(trace))]
    return " ".join([*words, "Score:", str(expected_score(trace, reference))])


def step_completion(reference: str, segment: str) -> str:
    """Return what the judge should write about one segment: `s4 50 31 bad Score: 1`, or `s3 none Score: 3`."""
    return " ".join([*_step_comparison(segment, reference), "Score:", str(expected_step_score(segment, reference))])


def _step_comparison(segment: str, reference: str) -> list[str]:
    """Return the segment's answer beside the reference's; or its step's value beside the checkpoint's (`none`: it was
    cut off before its value); or, where there is no such checkpoint, `none` alone, after the step's name if it has one.
    """
    answer = stated_answer(segment)
    if answer is not None:
        return ["ans", stated_answer(reference), *_compared(stated_answer(reference), answer)]
    words = segment.replace("###", " ").split()
    name = next((word for word in words[:1] if word in STEP_NAMES), None)
    if name in checkpoints(reference):
        value = checkpoints(reference)[name]
        return [name, value, *_compared(value, step_values(f"### {' '.join(words)}").get(name))]
    return ["none"] if name is None else [name, "none"]


def _compared(value: str | None, other: str | None) -> list[str]:
    return ["none"] if other is None else [other, "ok" if other == value else "bad"]


# Lessons: (prompt, completion) pairs, to be learnt from in this order


def base_sft_pairs(rng: Random, rows: int, excluded: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    """Chains worked to their end, first short ones, which teach the sums, then of all lengths, which teach every step.
    In the second half each further step is written with a small probability only, so that the base model does single
    steps well wherever they are and hardly ever finishes. A quarter of the prompts shows the reference, which makes
    going on likelier. Problem texts in `excluded` do not occur."""
    for row in range(rows):
        steps = written = rng.randint(1, 4 if row < 0.3 * rows else LONGEST)
        while (prompt := problem_text(chain := chain_problem(rng, steps))) in excluded:
            pass
        if hinted := rng.random() < 0.25:
            prompt = problem_with_reference_text(prompt, reference_text(chain))
        if row >= 0.5 * rows:
            written = steps_before_stopping(rng, steps, HINTED_GOES_ON if hinted else GOES_ON)
        found = values(chain)
        yield prompt, solution_text(chain, found[:written], found[-1] if written == steps else None)


def steps_before_stopping(rng: Random, steps: int, goes_on: float) -> int:
    """Return how many of a chain's steps are written, where each after the first has the probability `goes_on`."""
    return next((n for n in range(1, steps) if rng.random() >= goes_on), steps)


def judge_sft_pairs(rng: Random, rows: int, excluded: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    """Chains of one or two steps at first, which teach what is equal (the hardest part), then longer and longer ones,
    which teach where to look, and from the middle on chains of 4 to 7 steps. Three rows in ten are about one segment.
    Problem texts in `excluded` do not occur."""
    for row in range(rows):
        longest = max(2, min(LONGEST, int(36 * row / rows) - 9))
        steps = rng.randint(max(1, longest - 3), longest)
        alone = rng.random() < 0.3
        while (case := step_case(rng, steps) if alone else judge_case(rng, steps))[0] in excluded:
            pass
        if alone:
            yield step_prompt(*case), step_completion(*case[1:])
        else:
            yield judge_prompt(*case), judge_completion(*case[1:], past_errors=row < 0.6 * rows)


def judge_case(rng: Random, steps: int) -> tuple[str, str, str]:
    """Return a problem, a reference and a trace. Only the last two decide the score, and neither the problem nor the
    trace alone may betray it: a reference may hold a slip that the trace shares, a faultless trace may meet the
    reference of another problem, and the problem may be that of either or of neither.
    """
    problem, expected, solved, written = _comparison(rng, steps)
    return problem_text(problem), terse_text(expected), _as_a_policy_writes(rng, solved, written, expected)


def step_case(rng: Random, steps: int) -> tuple[str, str, str]:
    """Return the same with one segment of the trace, the last one more often than the others. A few segments end at the
    delimiter instead of beginning with it, or are cut off."""
    problem, expected, solved, written = _comparison(rng, steps)
    answer = rng.choices((None, written[-1], expected[-1]), (5, 90, 5))[0]
    place = len(written) - 1 if rng.random() < 0.2 else rng.randrange(len(written))
    if place < len(written) - 1:
        answer = rng.choices((None, written[place], expected[-1]), (92, 4, 4))[0]
    segment = "###" + solution_text(solved, written[: place + 1], answer).split("###")[-1]
    closed = f"{segment[4:]} ###" if answer is None else segment[4:]
    cut = " ".join(segment.split()[: rng.randrange(7)])
    return problem_text(problem), terse_text(expected), rng.choices((segment, closed, cut), (91, 6, 3))[0]


def _comparison(rng: Random, steps: int) -> tuple[Chain, list[int], Chain, list[int]]:
    """Return the problem to show, the values in the reference, the chain that the trace works out, and the trace's
    values.
    """
    shown = solved = chain_problem(rng, steps)
    slips = _slip(rng, steps) if rng.random() < 0.25 else {}
    expected = written = values(shown, slips)
    kind = rng.choices(("same", "slip", "mend", "fork", "other"), (35, 20, 5, 22, 18))[0]
    if kind == "slip":
        written = values(shown, {} if slips and rng.random() < 0.5 else _slip(rng, steps))
    elif kind == "mend":  # one value is wrong and the next is right again, and so the answer may be right
        written = list(expected)
        written[rng.randrange(steps)] = rng.randrange(MODULUS)
    elif kind == "fork":
        kept = shown.operations[: rng.randrange(steps)]
        solved = Chain(shown.start, kept + chain_problem(rng, steps - len(kept)).operations)
        written = values(solved, slips)
    elif kind == "other":
        solved = chain_problem(rng, steps if rng.random() < 0.7 else rng.randint(1, LONGEST))
        written = values(solved, _slip(rng, steps) if rng.random() < 0.3 else {})
    stranger = chain_problem(rng, steps if rng.random() < 0.7 else rng.randint(1, LONGEST))
    return rng.choice((shown, shown, solved, stranger)), expected, solved, written


def _slip(rng: Random, steps: int) -> dict[int, int]:
    return {rng.randrange(steps): rng.choice((1, 99, 10, 90, *rng.sample(range(1, MODULUS), 4)))}


def _as_a_policy_writes(rng: Random, chain: Chain, written: list[int], expected: list[int]) -> str:
    """Return the trace worked to its end, left early, with an odd answer, or with a step twice, missing or cut."""
    steps, answer = len(written), written[-1]
    if rng.random() < 0.5:
        steps = rng.choice((min(steps, 1 + int(rng.expovariate(0.8))), rng.randint(1, steps)))
        answer = rng.choices((None, written[steps - 1], expected[-1]), (80, 15, 5))[0]
    elif rng.random() < 0.06:
        answer = rng.choice((None, rng.randrange(MODULUS)))
    trace = solution_text(chain, written[:steps], answer)
    segments, place = ["###" + segment for segment in trace.split("###")[1:]], rng.randrange(steps)
    twice, missing = [*segments[: place + 1], *segments[place:]], [*segments[:place], *segments[place + 1 :]]
    cut, closed = trace.split()[: rng.randrange(7 * steps)], [*segments, "###"] if answer is None else segments
    return " ".join(" ".join(rng.choices((segments, twice, missing, cut, closed), (91, 2, 2, 2, 3))[0]).split())
