"""Prompt and completion pairs for supervised fine-tuning, from a file of them or from problems and their references."""

from pathlib import Path
from typing import Any

import numpy as np

from exprl_megatron.algorithms.batch import TrainSample
from exprl_megatron.config.problems import ProblemsConfig
from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.stages import SftStage
from exprl_megatron.errors import UserError
from exprl_megatron.models.tokenizer import load_tokenizer
from exprl_megatron.problems.needs import unmet_needs
from exprl_megatron.problems.order import problem_indices
from exprl_megatron.problems.problem import Problem
from exprl_megatron.problems.prompts import PromptBuilder, drop_overlong
from exprl_megatron.problems.records import encoding_fault
from exprl_megatron.problems.sources import json_rows, load_problems
from exprl_megatron.utils.array_fields import read_only
from exprl_megatron.utils.required import required

ExampleRow = tuple[str, str, str]
"""(name in error messages, prompt, completion)."""


class ExampleReader:
    """The batches of an SFT stage; each is a pure function of its step.

    The lines of `examples` are read in order, repeatedly; `problems` in a new seeded order each epoch. Prompts are
    built by `stage.prompt`, or by the run's `prompt`.

    Raises:
        UserError: the source cannot be used.
    """

    def __init__(self, config: RunConfig, stage: SftStage):
        self._max_tokens = config.policy.max_tokens
        self._tokenizer = load_tokenizer(config.policy.model)
        self._prompts = PromptBuilder(self._tokenizer, stage.prompt or config.prompt)
        self._rows: FileRows | ReferenceRows
        if stage.problems is None:
            self._rows = FileRows(_file(stage))
        else:
            self._rows = ReferenceRows(stage, self._prompts, self._max_tokens, config.seed)

    @property
    def dropped(self) -> int:
        """Number of problems that were left out because their prompts are too long."""
        return self._rows.dropped

    def batch(self, step: int, size: int) -> list[TrainSample]:
        """Return the `size` rows of step `step` (1-based); every completion ends with the end-of-sequence token.

        Raises:
            UserError: a row is longer than policy.max_tokens, or its text cannot be encoded.
        """
        return [self._sample(*row) for row in self._rows.take((step - 1) * size, size)]

    def _sample(self, name: str, prompt: str, completion: str) -> TrainSample:
        for what, text in (("prompt", prompt), ("completion", completion)):
            if (fault := self._prompts.fault(text)) is not None:
                raise UserError(f"{name}: its {what} {fault}")
        response = self._tokenizer(completion, add_special_tokens=False)["input_ids"]
        completion_ids = read_only((*response, self._tokenizer.eos_token_id), np.int32)
        sample = TrainSample(read_only(self._prompts.token_ids(prompt), np.int32), completion_ids)
        if len(sample) > self._max_tokens:
            raise UserError(
                f"{name} has {len(sample)} tokens, more than policy.max_tokens ({self._max_tokens}); "
                "shorten it, or raise the limit."
            )
        return sample


class FileRows:
    """The lines of a file of examples, in order, repeated."""

    dropped = 0

    def __init__(self, path: Path):
        self._rows = read_examples(path)

    def take(self, first: int, count: int) -> list[ExampleRow]:
        """Return the `count` rows from the `first` (0-based) on."""
        places = [place % len(self._rows) for place in range(first, first + count)]
        return [(f"Example {place + 1}", *self._rows[place]) for place in places]


class ReferenceRows:
    """Problems with their references as completions, in a new seeded order each epoch.

    Problems whose prompt is longer than `max_tokens` or the set's `max_prompt_tokens` are left out.
    """

    def __init__(self, stage: SftStage, prompts: PromptBuilder, max_tokens: int, seed: int):
        limit = min(max_tokens, _problems(stage).max_prompt_tokens or max_tokens)
        fitting = drop_overlong(problems_with_references(stage), prompts, limit)
        self._problems, self.dropped = fitting.problems, fitting.dropped
        self._order = (seed, stage.name)

    def take(self, first: int, count: int) -> list[ExampleRow]:
        """Return the `count` rows from the `first` (0-based) on."""
        places = problem_indices(*self._order, first, count, len(self._problems))
        problems = [self._problems[place] for place in places]
        return [
            (f"Problem {p.id} with its reference", p.statement, required(p.reference, "a reference").for_training())
            for p in problems
        ]


def check_source(stage: SftStage) -> None:
    """Check the stage's examples.

    Raises:
        UserError: they cannot be used.
    """
    if stage.problems is None:
        read_examples(_file(stage))
    else:
        problems_with_references(stage)


def _problems(stage: SftStage) -> ProblemsConfig:
    return required(stage.problems, "`problems` of a stage without `examples`")


def _file(stage: SftStage) -> Path:
    return Path(required(stage.examples, "`examples` of a stage without `problems`"))


def problems_with_references(stage: SftStage) -> list[Problem]:
    """Read the stage's problems.

    Raises:
        UserError: they cannot be read, or some have no reference.
    """
    problems = load_problems(_problems(stage))
    if missing := unmet_needs(problems, "reference"):
        raise UserError("\n".join(f"stage {stage.name}: {sentence}" for sentence in missing))
    return problems


def read_examples(path: Path) -> list[tuple[str, str]]:
    """Read (prompt, completion) of every line.

    Raises:
        UserError: the file cannot be read, or a line is faulty; the message has the number of the first such line.
    """
    if not path.is_file():
        raise UserError(f"There is no file of examples {path}; give the path of a JSON-lines file.")
    rows = [_row(place, record) for place, record in json_rows(path, "file of examples")]
    if not rows:
        raise UserError(f"The file of examples {path} is empty; give it lines with `prompt` and `completion`.")
    return rows


def _row(place: str, record: dict[str, Any] | str) -> tuple[str, str]:
    if isinstance(record, str):
        raise UserError(f"{place}: {record}")
    for key in ("prompt", "completion"):
        if not isinstance(record.get(key), str):
            raise UserError(f"{place} has no text in `{key}`; add it.")
        if fault := encoding_fault(record[key]):
            raise UserError(f"{place}: the field {key!r} {fault}")
    return record["prompt"], record["completion"]
