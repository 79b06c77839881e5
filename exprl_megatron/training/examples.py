"""Prompt and completion pairs for supervised fine-tuning."""

import json
from pathlib import Path

from transformers import AutoTokenizer

from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.stages import SftStage
from exprl_megatron.errors import UserError
from exprl_megatron.policy.batch import Sequence
from exprl_megatron.problems.prompts import PromptBuilder


class ExampleReader:
    """Rows of a JSON-lines file in their order, over again after the last; a pure function of the step."""

    def __init__(self, config: RunConfig, stage: SftStage):
        self._rows = read_examples(Path(stage.examples))
        self._tokenizer = AutoTokenizer.from_pretrained(config.policy.model)
        self._prompts = PromptBuilder(self._tokenizer, config.prompt)
        self._max_tokens = config.policy.max_tokens

    def batch(self, step: int, size: int) -> list[Sequence]:
        """The `size` rows of step `step` (1-based); the end-of-sequence token closes every completion.

        Raises UserError where a row is longer than policy.max_tokens.
        """
        first = (step - 1) * size
        return [self._sequence((first + i) % len(self._rows)) for i in range(size)]

    def _sequence(self, row: int) -> Sequence:
        prompt, completion = self._rows[row]
        response = self._tokenizer(completion, add_special_tokens=False)["input_ids"]
        sequence = Sequence(tuple(self._prompts.token_ids(prompt)), (*response, self._tokenizer.eos_token_id))
        if len(sequence) > self._max_tokens:
            raise UserError(
                f"Example {row + 1} has {len(sequence)} tokens, more than policy.max_tokens ({self._max_tokens}); "
                "shorten it, or raise the limit."
            )
        return sequence


def read_examples(path: Path) -> list[tuple[str, str]]:
    """(prompt, completion) of every line; raises UserError naming the first bad line by number."""
    if not path.is_file():
        raise UserError(f"There is no file of examples {path}; give the path of a JSON-lines file.")
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                rows.append(_row(path, number, line))
    if not rows:
        raise UserError(f"The file of examples {path} is empty; give it lines with `prompt` and `completion`.")
    return rows


def _row(path: Path, number: int, line: str) -> tuple[str, str]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}, line {number} is not JSON ({error}); mend or remove it.") from error
    if not isinstance(record, dict):
        raise UserError(f"{path}, line {number} is no JSON object; write one with `prompt` and `completion`.")
    for key in ("prompt", "completion"):
        if not isinstance(record.get(key), str):
            raise UserError(f"{path}, line {number} has no text in `{key}`; add it.")
    return record["prompt"], record["completion"]
