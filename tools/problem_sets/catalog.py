"""The public data sets by name: where each is published, how its rows become records, how many it should give."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from exprl_megatron.errors import UserError
from problem_sets import mathematics, packaged, programs, science
from problem_sets.loading import file_rows, hub_lines, hub_rows
from problem_sets.record import Record, Row

LIVECODEBENCH = "livecodebench/code_generation_lite"
SCIKNOWEVAL = "hicai-zju/SciKnowEval"
LIVECODEBENCH_SOLUTIONS = "violetxi/livecodebench_v6_gemini-3-pro"


@dataclass(frozen=True)
class Options:
    """What a user may choose."""

    seed: int = 0
    """Of the order of choices and of generated variants."""
    variants: int = 10
    """Questions for each template of gsm-symbolic."""
    max_tests: int | None = None
    """Tests for each program, the public ones first; None: all."""


@dataclass(frozen=True)
class DataSet:
    """A data set on the hub."""

    about: str
    hub: str
    record: Callable[[Row, Options], Record | None]
    split: str = "train"
    config: str | None = None
    files: tuple[str, ...] = ()
    """JSON-lines files to read instead of a split."""
    size: int | None = None
    """Records that it is known to give."""
    solutions: str | None = None
    """A second data set, whose rows hold solutions to rows of the first by their place in it."""

    def rows(self, split: str | None, copy: Path | None) -> Iterator[Row]:
        """Return all rows, from the hub or from a `copy` (a file of rows, or a directory like the hub's)."""
        if copy is not None and not copy.exists():
            raise UserError(f"There is no copy of the data set at {copy}; correct the path.")
        is_file = copy is not None and copy.is_file()
        if split is not None and (is_file or self.files):
            raise UserError(f"{self.hub} is read file by file here and has no splits; leave --split out.")
        if is_file:
            return file_rows(copy)
        name = self.hub if copy is None else str(copy)
        if self.files:
            return hub_lines(name, self.files)
        return hub_rows(name, split or self.split, self.config)


def _plain(record: Callable[[Row], Record | None]) -> Callable[[Row, Options], Record | None]:
    return lambda row, options: record(row)


def _math_arena(name: str, title: str, competition: str, size: int | None) -> DataSet:
    record = partial(mathematics.math_arena, competition=competition)
    return DataSet(f"{title}: answers, no references", f"MathArena/{name}", _plain(record), size=size)


def _livecodebench(row: Row, options: Options) -> Record | None:
    return programs.livecodebench(row, options.max_tests)


def _livecodebench_files(release: int) -> tuple[str, ...]:
    return ("test.jsonl", *(f"test{number}.jsonl" for number in range(2, release + 1)))


HUB: dict[str, DataSet] = {
    "int": DataSet(
        "InT: hard mathematics with worked solutions",
        "d1shs0ap/unified-hard-set-with-student-solutions-guided-rl",
        _plain(mathematics.int_hard),
        size=440,
    ),
    "pope": DataSet(
        "POPE: mathematics that a 4B model never solved, with Gemini's solutions",
        "CohenQu/POPE-hard-dataset-Qwen3-4B-Instruct-32k-128-filtered-iter3-gemini-success",
        _plain(mathematics.pope),
        split="test",
        size=1076,
    ),
    "sciknoweval-oe": DataSet(
        "SciKnowEval v1, open-ended physics of levels 4 and 5, with its own worked answers",
        SCIKNOWEVAL,
        _plain(science.sciknoweval_open_ended),
        files=("data/v1/sciknoweval_test_v1.jsonl",),
    ),
    "sciknoweval-oe-gemini": DataSet(
        "SciKnowEval's open-ended physics with Gemini's verified solutions",
        "violetxi/sciknoweval_oe_v1_physics_gemini-3-pro",
        _plain(science.sciknoweval_open_ended_with_solution),
    ),
    "sciknoweval-mcq": DataSet(
        "SciKnowEval v2, multiple choice of level 3 in the tasks that take reasoning: no references",
        SCIKNOWEVAL,
        _plain(science.sciknoweval_multiple_choice),
        split="test",
        config="v2",
    ),
    "sciknoweval-mcq-gemini": DataSet(
        "SciKnowEval's multiple choice with Gemini's verified solutions",
        "violetxi/sciknoweval_mcq_l3_loose_gemini-3-pro",
        _plain(science.sciknoweval_multiple_choice_with_solution),
    ),
    "livecodebench-v5": DataSet(
        "LiveCodeBench releases 1 to 5: tests, no references",
        LIVECODEBENCH,
        _livecodebench,
        files=_livecodebench_files(5),
        size=880,
    ),
    "livecodebench-v6": DataSet(
        "LiveCodeBench releases 1 to 6: tests, no references",
        LIVECODEBENCH,
        _livecodebench,
        files=_livecodebench_files(6),
        size=1055,
    ),
    "livecodebench-v6-gemini": DataSet(
        "LiveCodeBench releases 1 to 6: tests, and Gemini's solutions that pass them",
        LIVECODEBENCH,
        _livecodebench,
        files=_livecodebench_files(6),
        solutions=LIVECODEBENCH_SOLUTIONS,
    ),
    "aime-2025": _math_arena("aime_2025", "AIME 2025", "aime-2025", 30),
    "aime-2026": _math_arena("aime_2026", "AIME 2026", "aime-2026", 30),
    "hmmt-nov-2025": _math_arena("hmmt_nov_2025", "HMMT November 2025", "hmmt-nov-2025", 30),
    "imo-answerbench": DataSet(
        "IMO-AnswerBench: answers, no references",
        "Hwilner/imo-answerbench",
        _plain(mathematics.imo_answerbench),
        size=400,
    ),
    "gpqa-diamond": DataSet(
        "GPQA-diamond (gated on the hub), choices shuffled by --seed, explanations as references",
        "Idavidrein/gpqa",
        lambda row, options: science.gpqa_diamond(row, options.seed),
        config="gpqa_diamond",
        size=198,
    ),
    "olympiadbench-physics": DataSet(
        "OlympiadBench, open-ended text-only English physics with official solutions",
        "Hothan/OlympiadBench",
        _plain(science.olympiadbench_physics),
        config="OE_TO_physics_en_COMP",
        size=236,
    ),
    "dapo-math": DataSet(
        "DAPO-Math-17k, the English part without duplicates: answers, no references",
        "open-r1/DAPO-Math-17k-Processed",
        _plain(mathematics.dapo_math),
        config="en",
    ),
    "openmath": DataSet(
        "OpenMathReasoning: extracted answers with a model's solutions that reach them",
        "nvidia/OpenMathReasoning",
        _plain(mathematics.openmath),
        split="cot",
    ),
}
PACKAGED: dict[str, tuple[str, Callable[[Options], Iterator[Record]]]] = {
    "champ": ("CHAMP: 270 competition problems with human solutions, offline", lambda options: packaged.champ()),
    "gsm8k-test": (
        "100 of GSM8K's test questions with worked solutions, offline: not for training what is measured on GSM8K",
        lambda options: packaged.gsm8k_test(),
    ),
    "gsm-symbolic": (
        "--variants questions from each of GSM-symbolic's 100 templates, by --seed, offline",
        lambda options: packaged.gsm_symbolic(options.variants, options.seed),
    ),
}


def names() -> dict[str, str]:
    """Return every data set's name and what it is."""
    return {name: entry.about for name, entry in HUB.items()} | {name: about for name, (about, _) in PACKAGED.items()}


def candidates(
    name: str, options: Options, split: str | None = None, copy: Path | None = None, solutions: Path | None = None
) -> Iterator[Record | None]:
    """Yield the records of a data set in its order, None for each row that is filtered out.

    `split` is read instead of the data set's own; `copy` and `solutions` lie on this machine and are read instead of
    the hub. Raises UserError where rows cannot be read or are not of the form that the data set is known to have.
    """
    if name in PACKAGED:
        if split is not None or copy is not None:
            raise UserError(f"{name} comes from an installed package; leave --split and --from out.")
        yield from PACKAGED[name][1](options)
        return
    entry = HUB[name]
    known = None if entry.solutions is None else _solutions(entry.solutions, solutions)
    for place, row in enumerate(entry.rows(split, copy)):
        try:
            yield entry.record(row, options) if known is None else _solved(row, options, known.get(place))
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            raise UserError(
                f"Row {place} of {name} is not of the form that is known of {entry.hub} ({error!r}); it has the fields "
                f"{', '.join(row)}."
            ) from error


def _solutions(hub: str, copy: Path | None) -> dict[int, Row]:
    """Return the rows with solutions by the place of their problem in the other data set."""
    rows = hub_rows(hub, "train") if copy is None else file_rows(copy)
    return {row["extra_info"]["index"]: row for row in rows}


def _solved(row: Row, options: Options, other: Row | None) -> Record | None:
    solution = None if other is None else programs.livecodebench_solution(row, other)
    return None if solution is None else programs.livecodebench(row, options.max_tests, solution)
