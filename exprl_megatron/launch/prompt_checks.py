"""Checks before a start that policy and judge can read the prompts of a run, and shows some of them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from exprl_megatron.config.judging import JudgeConfig
from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.stages import ExprlProcessStage, JudgedStage, RlStage, SelfDistillStage
from exprl_megatron.errors import UserError
from exprl_megatron.judging.judge import Judge
from exprl_megatron.judging.judge_model import model_context
from exprl_megatron.judging.judgement import Granularity
from exprl_megatron.judging.labeled_traces import read_labeled_traces
from exprl_megatron.judging.rubric import MAX_CHECKPOINTS, Checkpoint, Rubric
from exprl_megatron.models.architecture import read_architecture
from exprl_megatron.models.tokenizer import load_tokenizer
from exprl_megatron.problems.problem import Problem
from exprl_megatron.problems.prompts import PromptBuilder, check_vocabulary, drop_overlong
from exprl_megatron.problems.records import raise_faults
from exprl_megatron.problems.sources import first_problem, load_problems

TRACE = "(the trace)"
_NUM_LONGEST = 8
"""Number of problems, those with most characters, among which the judge's longest prompt is searched."""

_EMPTY_RUBRIC = Rubric((Checkpoint("", 1.0, ""),) * MAX_CHECKPOINTS)
"""As many numbered lines as a rubric has at most, without their texts."""


def check_prompts(config: RunConfig) -> None:
    """Check that all prompts of the run can be built and fit into the context of their model.

    Raises:
        UserError: a prompt cannot be built or is too long.
    """
    tokenizer = load_tokenizer(config.policy.model)
    if config.needs_sampling_servers:
        _check_policy(config, tokenizer)
    for stage in config.stages:
        if isinstance(stage, SelfDistillStage):
            _check_teacher(config, stage, tokenizer)
    if config.judge is not None and config.needs_judge:
        judge = _judge(config.judge)
        if config.judge.gate is not None:
            traces = read_labeled_traces(config.judge.gate.traces, config.judge.gate.limit, config.domains)
            for problem in {trace.problem.domain: trace.problem for trace in traces}.values():
                judge.messages(problem, TRACE, "trace")
        for stage in config.stages:
            if isinstance(stage, JudgedStage):
                if config.judge.model is None:
                    _make_prompts(stage, judge)
                else:
                    _check_judge(config, stage, judge)


def preview_prompts(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield a title and the text of each prompt for the first problem of each stage that samples."""
    tokenizer = load_tokenizer(config.policy.model)
    builder = PromptBuilder(tokenizer, config.prompt)
    for stage in config.stages:
        if not isinstance(stage, RlStage):
            continue
        problem = first_problem(stage.problems)
        yield (
            f"stage {stage.name}, problem {problem.id}, to the policy",
            tokenizer.decode(builder.token_ids(problem.statement)),
        )
        if isinstance(stage, JudgedStage) and config.judge is not None:
            for message in _judge(config.judge).messages(problem, TRACE, _granularities(stage)[0]):
                title = f"stage {stage.name}, problem {problem.id}, to the judge ({message['role']})"
                yield title, message["content"]


def _check_policy(config: RunConfig, tokenizer: Any) -> None:
    builder, model = PromptBuilder(tokenizer, config.prompt), config.policy.model
    for problems, sampling in config.problem_sets().items():
        room = config.policy.max_tokens - sampling.max_new_tokens
        prompted = drop_overlong(load_problems(problems), builder, min(room, problems.max_prompt_tokens or room))
        check_vocabulary(model, read_architecture(model).vocabulary, prompted.prompts)


def _check_teacher(config: RunConfig, stage: SelfDistillStage, tokenizer: Any) -> None:
    builder = PromptBuilder(tokenizer, stage.teacher_prompt)
    faults = (
        (problem, builder.fault(problem.reference.for_training()))
        for problem in load_problems(stage.problems)
        if problem.reference is not None
    )
    raise_faults([f"the reference of problem {problem.id} {fault}" for problem, fault in faults if fault is not None])


def _check_judge(config: RunConfig, stage: JudgedStage, judge: Judge) -> None:
    """Raise UserError where the longest prompt, trace and answer do not fit into the judge's context.

    With checkpoints both prompts are counted: the one with the longest rubric, and the one with the reference, for
    problems whose rubric cannot be built.
    """
    context, answer = model_context(config.required_judge.served_model), config.required_judge.max_new_tokens
    trace = stage.sampling.max_new_tokens
    problems = _longest(load_problems(stage.problems))
    found = [
        (tokens, problem, what)
        for granularity in _granularities(stage)
        for problem in problems
        for tokens, what in _lengths(config, judge, problem, granularity)
    ]
    longest, problem, what = max(found, key=lambda row: row[0])
    if longest + trace + answer > context:
        raise UserError(
            f"stage {stage.name}: the judge in {config.required_judge.model} has a context of {context} tokens, but "
            f"its prompt about problem {problem.id} has {longest}{what} without a trace, a trace up to {trace} "
            f"(sampling.max_new_tokens) and its answer up to {answer} (judge.max_new_tokens); lower these, or "
            "use a judge with a longer context."
        )


def _make_prompts(stage: JudgedStage, judge: Judge) -> None:
    """Raise UserError where a prompt to a closed API cannot be built; only the API can tell if it is too long."""
    for problem in _longest(load_problems(stage.problems)):
        for granularity in _granularities(stage):
            judge.messages(problem, "", granularity)


def _lengths(config: RunConfig, judge: Judge, problem: Problem, granularity: Granularity) -> Iterator[tuple[int, str]]:
    """Yield the tokens of each possible prompt about `problem` without a trace, and a note on what they include."""
    yield len(judge.prompt_ids(problem, "", granularity)), ""
    rubric = config.required_judge.rubric
    if rubric.kind == "checkpoints" and problem.reference is not None:
        tokens = len(judge.prompt_ids(problem, "", granularity, _EMPTY_RUBRIC)) + rubric.max_new_tokens
        yield tokens, f" with checkpoints of up to {rubric.max_new_tokens} (judge.rubric.max_new_tokens)"


def _longest(problems: Sequence[Problem]) -> list[Problem]:
    """Return the longest problems, and one of each domain, whose prompts may differ."""

    def size(problem: Problem) -> int:
        return len(problem.statement) + (0 if problem.reference is None else len(problem.reference.for_judge()))

    of_domains = {problem.domain: problem for problem in problems}
    return [*sorted(problems, key=size)[-_NUM_LONGEST:], *of_domains.values()]


def _granularities(stage: JudgedStage) -> list[Granularity]:
    """Return the granularities with which the stage has its traces judged."""
    if not isinstance(stage, ExprlProcessStage):
        return ["trace"]
    return sorted({stage.granularity, *(route.granularity for route in stage.routes.values())})


def _judge(config: JudgeConfig) -> Judge:
    model = config.model
    return Judge(config, [], None if model is None else load_tokenizer(model))


def unchecked_model(config: RunConfig) -> str | None:
    """Return a sentence about what cannot be checked, since a model is not on this machine; None if all can be."""
    judge = config.judge.model if config.judge is not None and config.needs_judge else None
    models = [config.policy.model, *([] if judge is None else [judge])]
    missing = [model for model in dict.fromkeys(models) if not (Path(model) / "config.json").is_file()]
    if not missing:
        return None
    return f"not checked: models, problems and prompts, since {' and '.join(missing)} cannot be read here."
