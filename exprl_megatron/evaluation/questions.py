"""The problems of an evaluation with their prompts, and the problems that are left out."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from exprl_megatron.errors import UserError
from exprl_megatron.evaluation.eval_config import EvalConfig
from exprl_megatron.evaluation.result_store import question_key
from exprl_megatron.models.tokenizer import load_tokenizer
from exprl_megatron.problems.needs import is_verifiable, unmet_needs
from exprl_megatron.problems.problem import Problem
from exprl_megatron.problems.prompts import PromptBuilder, check_vocabulary, drop_overlong
from exprl_megatron.problems.sources import load_records
from exprl_megatron.rollout.sampler import Prompt
from exprl_megatron.utils.array_fields import read_only
from exprl_megatron.utils.text_check import TextCheck, text_check_of


@dataclass(frozen=True)
class EvalQuestion:
    """A problem with its prompt."""

    problem: Problem
    record: dict
    """The problem as it was read."""
    prompt: Prompt
    key: str
    """A hash of everything that the result depends on: prompt, domain, answer, choices, tests."""


@dataclass(frozen=True)
class EvalQuestions:
    """The questions in the order of the problems, and the numbers of problems left out."""

    questions: tuple[EvalQuestion, ...]
    unverifiable: tuple[str, ...]
    """A sentence for each domain about problems that cannot be verified."""
    unverifiable_count: int
    overlong_count: int
    """Number of problems whose prompt is longer than `longest_prompt` tokens."""
    longest_prompt: int
    vocabulary: int
    """Number of token ids of the model."""
    text_check: TextCheck | None
    """The model's check of texts against token ids; None where it has none."""

    def left_out(self) -> list[str]:
        """Return a line for each reason for which problems are left out."""
        found = [f"not measured: {sentence}" for sentence in self.unverifiable]
        if self.overlong_count:
            found.append(f"not measured: {self.overlong_count} prompts of more than {self.longest_prompt} tokens")
        return found


def read_questions(settings: EvalConfig) -> EvalQuestions:
    """Read the problems and build their prompts with the model's own tokenizer.

    Raises:
        UserError: the problems, the tokenizer or the model's context cannot be used, or no problem is left.
    """
    custom = settings.verifiers
    loaded = load_records(settings.problems)
    records = {problem.id: record for problem, record in loaded}
    problems = [problem for problem, _ in loaded if problem.domain in custom or is_verifiable(problem)]
    unverifiable = unmet_needs([problem for problem, _ in loaded], "verification", custom)
    if not problems:
        raise UserError("\n".join(unverifiable))
    from transformers import AutoConfig

    model = AutoConfig.from_pretrained(settings.model).get_text_config()
    longest = _longest_prompt(settings, model.max_position_embeddings)
    tokenizer = load_tokenizer(settings.model)
    builder = PromptBuilder(tokenizer, settings.prompt)
    prompted = drop_overlong(problems, builder, longest)
    check_vocabulary(settings.model, model.vocab_size, prompted.prompts)
    questions = [
        EvalQuestion(problem, records[problem.id], Prompt(problem.id, read_only(ids, np.int32)), _key(problem, ids))
        for problem, ids in zip(prompted.problems, prompted.prompts, strict=True)
    ]
    return EvalQuestions(
        tuple(questions),
        tuple(unverifiable),
        len(loaded) - len(problems),
        prompted.dropped,
        longest,
        model.vocab_size,
        text_check_of(tokenizer),
    )


def _longest_prompt(settings: EvalConfig, positions: int) -> int:
    room = positions - settings.sampling.max_new_tokens
    if room < 1:
        raise UserError(
            f"max_new_tokens is {settings.sampling.max_new_tokens}, but {settings.model} has {positions} positions, "
            "including the prompt; lower --max-new-tokens."
        )
    return min(room, settings.problems.max_prompt_tokens or room)


def _key(problem: Problem, prompt_ids: Sequence[int]) -> str:
    tests = [asdict(test) for test in problem.tests]
    return question_key(list(prompt_ids), problem.domain, problem.answer, list(problem.choices), tests)
