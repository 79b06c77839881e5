"""The teacher of self-distillation: the reference policy, under a prompt that contains the reference solution.

Its prompts go only to the scorer of the reference policy: the trainer, or the separate server that
`policy.ref_policy: server` starts and that samples nothing. No sampling server ever receives a teacher's prompt.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from exprl_megatron.algorithms.batch import TrainSample
from exprl_megatron.config.problems import PromptConfig
from exprl_megatron.errors import UserError
from exprl_megatron.problems.needs import MAX_SHOWN_IDS, unmet_needs
from exprl_megatron.problems.problem import Problem
from exprl_megatron.problems.prompts import chat_token_ids
from exprl_megatron.rollout.group import Group
from exprl_megatron.utils.array_fields import read_only
from exprl_megatron.utils.required import required


def teacher_token_ids(tokenizer: Any, config: PromptConfig, problem: Problem) -> tuple[int, ...]:
    """Build the teacher's prompt: `config.user` with {problem} and {reference} filled in, then the assistant's turn.

    Raises:
        RuntimeError: the problem has no reference.
    """
    reference = required(problem.reference, f"the reference of problem {problem.id!r}")
    texts = {"{problem}": problem.statement, "{reference}": reference.for_training()}
    # In one pass, so that a placeholder within a problem or a reference stays as it is.
    user = re.sub(r"\{problem\}|\{reference\}", lambda found: texts[found.group()], config.user)
    return chat_token_ids(tokenizer, config, user)


def teacher_prompts(
    tokenizer: Any, config: PromptConfig, problems: Iterable[Problem], max_tokens: int
) -> dict[str, tuple[int, ...]]:
    """Build the teacher's prompts by problem id.

    Raises:
        UserError: a problem has no reference, or a prompt is longer than `max_tokens`.
    """
    problems = list(problems)
    if missing := unmet_needs(problems, "reference"):
        raise UserError("\n".join(missing))
    prompts = {problem.id: teacher_token_ids(tokenizer, config, problem) for problem in problems}
    long = [problem_id for problem_id, ids in prompts.items() if len(ids) > max_tokens]
    if long:
        shown = ", ".join(long[:MAX_SHOWN_IDS]) + (", ..." if len(long) > MAX_SHOWN_IDS else "")
        longest = max(len(prompts[problem_id]) for problem_id in long)
        raise UserError(
            f"{len(long)} of {len(prompts)} prompts of the teacher have more than the {max_tokens} tokens that "
            f"remain of policy.max_tokens after sampling.max_new_tokens ({shown}; the longest has {longest}); "
            "raise policy.max_tokens, or leave these problems out."
        )
    return prompts


def student_and_teacher(
    groups: Iterable[Group], prompts: Mapping[str, tuple[int, ...]]
) -> tuple[list[TrainSample], list[TrainSample]]:
    """Return every trace that is not empty, after the student's prompt and after the teacher's, in the same order.

    Traces without a score are included. The log-probs of the second list under
    the reference policy become the `ref_log_probs` of the first.
    """
    students, teachers = [], []
    for number, group in enumerate(groups):
        for trace in (sample.trace for sample in group.samples if len(sample.trace.token_ids)):
            students.append(
                TrainSample(
                    trace.prompt_ids,
                    trace.token_ids,
                    rollout_log_probs=trace.log_probs,
                    routed_experts=trace.routed_experts,
                    place=(number, trace.sample),
                )
            )
            teachers.append(TrainSample(read_only(prompts[group.problem_id], np.int32), trace.token_ids))
    return students, teachers
