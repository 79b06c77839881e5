"""Self-distillation's teacher: the frozen start of the stage, under a prompt that shows the reference.

What is made here goes to whoever scores the stage's start: the trainer, or the server of its own that
`policy.starting_policy` asks for, where nothing is sampled. No sampling server ever gets a prompt of the teacher.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from exprl_megatron.algorithms.batch import Sequence
from exprl_megatron.config.problems import PromptConfig
from exprl_megatron.errors import UserError
from exprl_megatron.problems.needs import SHOWN_IDS, missing_for
from exprl_megatron.problems.problem import Problem
from exprl_megatron.problems.prompts import chat_token_ids
from exprl_megatron.rollout.group import Group


def teacher_token_ids(tokenizer: Any, config: PromptConfig, problem: Problem) -> tuple[int, ...]:
    """The teacher's prompt: {problem} and {reference} of `config.user` filled, the assistant's turn opened."""
    texts = {"{problem}": problem.statement, "{reference}": problem.reference.for_training()}
    # In one pass, so that a placeholder within a problem or a reference stays as it is.
    user = re.sub(r"\{problem\}|\{reference\}", lambda found: texts[found.group()], config.user)
    return chat_token_ids(tokenizer, config, user)


def teacher_prompts(
    tokenizer: Any, config: PromptConfig, problems: Iterable[Problem], max_tokens: int
) -> dict[str, tuple[int, ...]]:
    """The teacher's prompt of every problem, by its id.

    Raises UserError where a problem has no reference, or a prompt is longer than `max_tokens`.
    """
    problems = list(problems)
    if missing := missing_for(problems, "reference"):
        raise UserError("\n".join(missing))
    prompts = {problem.id: teacher_token_ids(tokenizer, config, problem) for problem in problems}
    long = [problem_id for problem_id, ids in prompts.items() if len(ids) > max_tokens]
    if long:
        shown = ", ".join(long[:SHOWN_IDS]) + (", ..." if len(long) > SHOWN_IDS else "")
        longest = max(len(prompts[problem_id]) for problem_id in long)
        raise UserError(
            f"{len(long)} of {len(prompts)} prompts of the teacher have more than the {max_tokens} tokens that "
            f"policy.max_tokens leaves beside sampling.max_new_tokens ({shown}; the longest has {longest}); "
            "raise policy.max_tokens, or leave these problems out."
        )
    return prompts


def student_and_teacher(
    groups: Iterable[Group], prompts: Mapping[str, tuple[int, ...]]
) -> tuple[list[Sequence], list[Sequence]]:
    """Every trace that has a token, once under its own prompt and once under its teacher's; in the same order.

    No grade is asked for: traces without one are learned from as well. The log-probs of the second list under
    the stage's start become the `start_log_probs` of the first.
    """
    students, teachers = [], []
    for group in groups:
        for trace in (member.trace for member in group.members if len(member.trace.token_ids)):
            students.append(Sequence(trace.prompt_ids, trace.token_ids, sampler_log_probs=trace.log_probs))
            teachers.append(Sequence(prompts[group.problem_id], trace.token_ids))
    return students, teachers
