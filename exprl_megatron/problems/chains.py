"""Chains of small sums: the problems of the miniature experiment, and the texts that teach it.

A chain starts at a number and applies `+`, `-` and `*` with small operands, modulo 100. Every text is a
row of words parted by single blanks, and each word is one token (`VOCABULARY`):

    problem       Q 7 s1 + 5 s2 * 3 A
    reference     ### s1 7 + 5 = 12 ### s2 12 * 3 = 36 ans 36
    judge reads   <problem> REF <reference> TR <trace> JUDGE
    judge writes  s1 12 12 ok s2 36 40 bad ans 36 40 bad Score: 2

Steps have names (`s1`, `s2`, ...) in all of them, so that a small transformer finds a step by its name
instead of by counting. For each step the judge writes the reference's value, the trace's value and whether
they agree; it stops at the first step where they do not, compares the answers and scores. Everything here is a
pure function of its arguments and of the `Random` it is given."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from random import Random

LONGEST = 7  # steps in a chain
LONG = (5, 6, 7)  # steps of the training and held-out problems
OPERANDS = range(2, 6)
MODULUS = 100
SPECIAL_WORDS = ("<pad>", "<eos>", "<unk>")
WORDS = ("Q", "A", "###", "=", "ans", "+", "-", "*", "REF", "TR", "JUDGE", "ok", "bad", "none", "Score:")
VOCABULARY = (*SPECIAL_WORDS, *WORDS, *(f"s{i}" for i in range(1, LONGEST + 1)), *map(str, range(MODULUS)))


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
    """The value after each step. `slips` maps steps, counted from 0, to what is wrongly added there; the steps
    that follow go on from the wrong value."""
    found = [chain.start]
    for index, (sign, operand) in enumerate(chain.operations):
        found.append((apply(found[-1], sign, operand) + (slips or {}).get(index, 0)) % MODULUS)
    return found[1:]


def problem_text(chain: Chain) -> str:
    steps = [f"s{i} {sign} {operand}" for i, (sign, operand) in enumerate(chain.operations, 1)]
    return " ".join(["Q", str(chain.start), *steps, "A"])


def solution_text(chain: Chain, written: list[int], answer: int | None) -> str:
    """The steps whose values are `written`, which may be fewer than the chain has, then the answer."""
    before = [chain.start, *written]
    steps = zip(before, chain.operations, written, strict=False)
    parts = [f"### s{i} {start} {sign} {operand} = {end}" for i, (start, (sign, operand), end) in enumerate(steps, 1)]
    return " ".join(parts if answer is None else [*parts, f"ans {answer}"])


def reference_text(chain: Chain) -> str:
    return solution_text(chain, values(chain), values(chain)[-1])


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


def stated_answer(solution: str) -> str | None:
    _, _, after = solution.partition("ans ")
    return after.split()[0] if after.split() else None


def leading_steps(trace: str, reference: str) -> int:
    """How many of the reference's steps the trace has right before the first that it has not. A step is right when
    the trace has one of that name with that value."""
    written = step_values(trace)
    agree = [written.get(name) == value for name, value in step_values(reference).items()]
    return [*agree, False].index(False)


def expected_score(trace: str, reference: str) -> int:
    """5: the answer and all steps are right. 4: the answer is right, but not all steps. Below that the answer is
    wrong or missing, and the share of leading right steps decides: 3 from 60 %, 2 from 25 %, else 1. So a score
    of 4 or more says exactly that the final answer is right."""
    right, steps = leading_steps(trace, reference), len(step_values(reference))
    if stated_answer(trace) == stated_answer(reference):
        return 5 if right == steps else 4
    return 3 if right >= 0.6 * steps else 2 if right >= 0.25 * steps else 1


def judge_prompt(problem: str, reference: str, trace: str) -> str:
    return " ".join(f"{problem} REF {reference} TR {trace} JUDGE".split())


def judge_completion(reference: str, trace: str, *, past_errors: bool = False) -> str:
    """What the judge should write. With `past_errors` it compares all steps that the trace has: the early rows of
    its lessons do so, because it learns where to look from steps that differ."""
    written, words = step_values(trace), []
    for name, value in step_values(reference).items():
        other = written.get(name)
        words += [name, value, *_compared(value, other)]
        if other is None or (other != value and not past_errors):
            break
    answer = stated_answer(reference)
    words += ["ans", answer, *_compared(answer, stated_answer(trace))]
    return " ".join([*words, "Score:", str(expected_score(trace, reference))])


def _compared(value: str | None, other: str | None) -> list[str]:
    return ["none"] if other is None else [other, "ok" if other == value else "bad"]


# Lessons: (prompt, completion) pairs, to be learnt from in this order


def base_sft_pairs(rng: Random, rows: int, excluded: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    """Chains worked to their end, first short ones, which teach the sums, then of all lengths, which teach every step.
    In the second half each further step is written with 40 % only, so that the base model does single steps well
    wherever they are and hardly ever finishes. Problem texts in `excluded` do not occur."""
    for row in range(rows):
        steps = written = rng.randint(1, 4 if row < 0.3 * rows else LONGEST)
        while problem_text(chain := chain_problem(rng, steps)) in excluded:
            pass
        if row >= 0.5 * rows:
            written = next((n for n in range(1, steps) if rng.random() >= 0.4), steps)
        found = values(chain)
        yield problem_text(chain), solution_text(chain, found[:written], found[-1] if written == steps else None)


def judge_sft_pairs(rng: Random, rows: int, excluded: Collection[str] = ()) -> Iterator[tuple[str, str]]:
    """Single steps at first, which teach what is equal (the hardest part), then longer and longer chains, which teach
    where to look, and from the middle on chains of 4 to 7 steps. Problem texts in `excluded` do not occur."""
    for row in range(rows):
        longest = max(1, min(LONGEST, int(36 * row / rows) - 10))
        steps = rng.randint(max(1, longest - 3), longest)
        while (case := judge_case(rng, steps))[0] in excluded:
            pass
        yield judge_prompt(*case), judge_completion(*case[1:], past_errors=row < 0.6 * rows)


def judge_case(rng: Random, steps: int) -> tuple[str, str, str]:
    """A problem, a reference and a trace. Only the last two decide the score, and neither the problem nor the trace
    alone may betray it: a reference may hold a slip that the trace shares, a faultless trace may meet the reference
    of another problem, and the problem may be that of either or of neither."""
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
    problem, reference = rng.choice((shown, shown, solved, stranger)), solution_text(shown, expected, expected[-1])
    return problem_text(problem), reference, _as_a_policy_writes(rng, solved, written, expected)


def _slip(rng: Random, steps: int) -> dict[int, int]:
    return {rng.randrange(steps): rng.choice((1, 99, 10, 90, *rng.sample(range(1, MODULUS), 4)))}


def _as_a_policy_writes(rng: Random, chain: Chain, written: list[int], expected: list[int]) -> str:
    """The trace worked to its end, or left early, or with an odd answer, or with a step twice, missing or cut."""
    steps, answer = len(written), written[-1]
    if rng.random() < 0.5:
        steps = rng.choice((min(steps, 1 + int(rng.expovariate(0.8))), rng.randint(1, steps)))
        answer = rng.choices((None, written[steps - 1], expected[-1]), (80, 15, 5))[0]
    elif rng.random() < 0.06:
        answer = rng.choice((None, rng.randrange(MODULUS)))
    trace = solution_text(chain, written[:steps], answer)
    segments, place = ["###" + segment for segment in trace.split("###")[1:]], rng.randrange(steps)
    twice, missing = [*segments[: place + 1], *segments[place:]], [*segments[:place], *segments[place + 1 :]]
    cut = trace.split()[: rng.randrange(7 * steps)]
    return " ".join(" ".join(rng.choices(([trace], twice, missing, cut), (94, 2, 2, 2))[0]).split())
