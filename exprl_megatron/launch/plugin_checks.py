"""Loads the user's functions in a config, calls them once on small inputs, and hashes them, before a run starts.

A failure here would also occur in the run: an import, a signature, a result of another type, an exception on an empty
trace.
"""

import asyncio
from collections.abc import Iterator
from typing import get_args

from exprl_megatron.config.losses import Advantage, Surrogate
from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.stage_kinds import CustomStageConfig
from exprl_megatron.config.stages import ExprlOutcomeStage, RlStage, SftStage, SparseRlStage
from exprl_megatron.judging.judgement import Abstained, Judgement, Scored
from exprl_megatron.launch.custom_stage_trial import check_custom_stages, empty_trace, try_custom_stage
from exprl_megatron.plugins.calling import Plugin
from exprl_megatron.plugins.failures import PluginError
from exprl_megatron.plugins.loading import plugin_source, use_plugin_path
from exprl_megatron.problems.problem import Problem
from exprl_megatron.problems.sources import first_problem, is_custom_source, load_problems
from exprl_megatron.rollout.custom_functions import CustomFunction, custom_verifiers
from exprl_megatron.rollout.group import GradedTrace, Group, StepInfo
from exprl_megatron.runs.directory import PLUGINS
from exprl_megatron.training.custom_metrics import custom_step_metrics
from exprl_megatron.training.custom_rewards import custom_terms

ScoredStage = ExprlOutcomeStage | SparseRlStage
FAILURES = ("verifier-error", "verifier-timeout")


def plugins_of(config: RunConfig) -> dict[str, str]:
    """Return the plugins of a config: the path of each by the key that names it."""
    return dict(_plugins(config))


def _plugins(config: RunConfig) -> Iterator[tuple[str, str]]:
    yield from ((f"verifier.domains.{domain}", path) for domain, path in config.verifier.domains.items())
    yield from ((f"step_metrics.{i}", path) for i, path in enumerate(config.step_metrics))
    if config.evaluation is not None and is_custom_source(config.evaluation.problems.source):
        yield "evaluation.problems.source", config.evaluation.problems.source
    for number, stage in enumerate(config.stages):
        if isinstance(stage, CustomStageConfig):
            yield f"stages.{number}.kind", stage.kind
        if isinstance(stage, RlStage | SftStage) and stage.problems and is_custom_source(stage.problems.source):
            yield f"stages.{number}.problems.source", stage.problems.source
        if isinstance(stage, ScoredStage):
            yield from ((f"stages.{number}.reward.{i}.term", t.term) for i, t in enumerate(stage.reward) if t.is_custom)
            if stage.advantage not in get_args(Advantage):
                yield f"stages.{number}.advantage", stage.advantage
        if isinstance(stage, RlStage) and stage.loss.surrogate not in get_args(Surrogate):
            yield f"stages.{number}.loss.surrogate", stage.loss.surrogate


def plugin_hashes(config: RunConfig) -> dict[str, str]:
    """Return the hash of the source of each plugin, under `plugins.PATH`.

    Raises:
        PluginError: a plugin cannot be loaded.
    """
    use_plugin_path(config.plugin_path)
    return {f"{PLUGINS}{path}": plugin_source(path).sha256 for path in sorted({*plugins_of(config).values()})}


def check_plugin_code(config: RunConfig) -> None:
    """Load every plugin, and try those that need no problem.

    Raises:
        PluginError: a plugin cannot be loaded, takes other arguments, fails, or returns an invalid result.
    """
    custom_kinds = {stage.kind for stage in config.stages if isinstance(stage, CustomStageConfig)}
    for key, path in plugins_of(config).items():
        if path not in custom_kinds:
            Plugin.load(key, path)
    check_custom_stages(config)
    custom_verifiers(config.verifier, _silent)
    custom_step_metrics(config.step_metrics)(StepInfo("a", 1), [_sample_group()])
    for stage in config.stages:
        if isinstance(stage, ScoredStage):
            custom_terms(stage.name, stage.reward, config.verifier.answer_deadline_s, _silent)
            if stage.advantage not in get_args(Advantage):
                _try_estimator(stage)
        if isinstance(stage, RlStage) and stage.loss.surrogate not in get_args(Surrogate):
            _try_surrogate(stage)


def check_plugins_on_problems(config: RunConfig) -> None:
    """Call every verifier and reward term of the user with the first problem of its domain, and an empty trace.

    A stage of the user's own is tried with such traces of the first problems.

    Raises:
        PluginError: a function raises an exception, gives no answer in time, or returns an invalid result.
    """
    verifiers = custom_verifiers(config.verifier, _silent)
    for problems in config.problem_sets() if verifiers else ():
        first: dict[str, Problem] = {}
        for problem in load_problems(problems):
            first.setdefault(problem.domain, problem)
        for domain, problem in first.items():
            if domain in verifiers:
                asyncio.run(_try(verifiers[domain], problem, is_verifier=True))
    for stage in config.stages:
        if isinstance(stage, CustomStageConfig):
            try_custom_stage(config, stage)
        if isinstance(stage, ScoredStage) and any(term.is_custom for term in stage.reward):
            problem = first_problem(stage.problems)
            for term in custom_terms(stage.name, stage.reward, config.verifier.answer_deadline_s, _silent).values():
                asyncio.run(_try(term, problem, is_verifier=False))


async def _try(function: CustomFunction, problem: Problem, is_verifier: bool) -> None:
    trace = empty_trace(problem.id)
    if is_verifier:
        judgement = await function.verify(problem, trace)
        failed = judgement.evidence if isinstance(judgement, Abstained) and judgement.reason in FAILURES else None
    else:
        value, evidence = await function.value(problem, trace)
        failed = evidence if value is None and evidence.startswith(FAILURES) else None
    if failed is not None:
        raise PluginError(
            f"{function.plugin.key}: {function.plugin.path} was called with problem {problem.id} and an empty trace, "
            f"which a policy may write, and gave no result: {failed}"
        )


def _sample_group() -> Group:
    """Return a group of two traces, of which one has no score."""
    judgements: tuple[Judgement, ...] = (Scored(0.5, "as a trial"), Abstained("timeout"))
    return Group("sample", tuple(GradedTrace(empty_trace("sample", k), j) for k, j in enumerate(judgements)))


def _try_estimator(stage: ScoredStage) -> None:
    import torch

    from exprl_megatron.algorithms.advantages import advantage_fn

    scores = torch.linspace(0, 1, 2 * stage.group_size, dtype=torch.float64).view(2, stage.group_size)
    valid = torch.ones_like(scores, dtype=torch.bool)
    for count in (0, 1, 2 * stage.group_size):
        # No trace abstains, one does, and all do.
        valid.view(-1)[:count] = False
        advantage_fn(stage.advantage)(scores, valid)


def _try_surrogate(stage: RlStage) -> None:
    import torch

    from exprl_megatron.algorithms.surrogates import SurrogateBatch, custom_surrogate

    log_probs = torch.tensor([[-1.0, -0.5, 0.0], [-2.0, -0.1, -0.2]], requires_grad=True)
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    advantages = mask * torch.tensor([[1.0], [-1.0]])
    loss = stage.loss
    custom_surrogate(
        loss.surrogate,
        SurrogateBatch(log_probs, log_probs.detach() - 0.1, advantages, mask, loss.clip_low, loss.clip_high),
    ).sum().backward()


def _silent(text: str) -> None:
    """Print nothing: these checks raise failures as errors."""
