"""Stages of the user: calls their hooks on rank 0, and checks their results and errors."""

import inspect
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.stage_kinds import CustomStageConfig
from exprl_megatron.errors import Preempted, RunStopped, ServerError, UserError
from exprl_megatron.judging.judgement import Abstained, Scored
from exprl_megatron.plugins.calling import Plugin, described
from exprl_megatron.plugins.failures import PluginError, place_of_error
from exprl_megatron.plugins.loading import load_object
from exprl_megatron.rollout.custom_stage import CustomStage, LearnedTrace
from exprl_megatron.rollout.group import Group, StepInfo
from exprl_megatron.training.custom_metrics import checked_metrics
from exprl_megatron.training.custom_rollouts import StepContext
from exprl_megatron.training.train_samples import GradedStage, TokenAdvantages, token_advantages
from exprl_megatron.utils.files import write_atomically

ENDS_THE_RUN = (UserError, ServerError, RunStopped, Preempted)


class StageHooks:
    """The user's instance of one stage.

    Args:
        stage: the stage's config.
        log: prints a line for the user.

    Raises:
        PluginError: the class cannot be loaded, is not an CustomStage, refuses the settings, or has a hook with another
            signature. Every method raises it where the hook fails or returns an invalid result.
    """

    def __init__(self, stage: Any, log: Callable[[str], None]):
        self._stage: GradedStage = stage
        self._config: CustomStageConfig = stage
        self._log = log
        key = f"kind of stage {stage.name}"
        try:
            found = load_object(stage.kind)
        except PluginError as error:
            raise PluginError(f"{key}: {error}") from error
        if not (inspect.isclass(found) and issubclass(found, CustomStage)):
            shown = "a class" if inspect.isclass(found) else described(found)
            raise PluginError(
                f"{key}: {stage.kind} is {shown} that does not inherit from exprl_megatron.api.CustomStage; derive it "
                "from that class."
            )
        # Errors name the class until there is an instance.
        self._plugin = Plugin(key, stage.kind, found)
        self._instance: CustomStage = self._plugin.guarded(lambda: found(dict(stage.settings)))
        self._check_forms(found)

    def _check_forms(self, found: type[CustomStage]) -> None:
        for name in ("rollout", "learn", "kept_problems", "state_dict", "load_state_dict"):
            hook, form = getattr(found, name), getattr(CustomStage, name)
            arguments = list(inspect.signature(form).parameters)
            Plugin(self._plugin.key, f"{self._plugin.path}.{name}", hook).check_arguments(tuple(arguments))
            if inspect.iscoroutinefunction(hook) != inspect.iscoroutinefunction(form):
                wanted = "`async def`" if inspect.iscoroutinefunction(form) else "`def`, not async"
                raise Plugin(self._plugin.key, f"{self._plugin.path}.{name}", hook).failure(f"must be {wanted}")

    @property
    def samples(self) -> bool:
        """Whether the user's code samples the steps."""
        return type(self._instance).rollout is not CustomStage.rollout

    @property
    def keeps_problems(self) -> bool:
        """Whether the user's code chooses problems for later stages."""
        return type(self._instance).kept_problems is not CustomStage.kept_problems

    async def rollout(self, context: StepContext) -> list[Group]:
        """Return the groups of a step; an error of the context ends the run, even if the user's code catches it.

        Raises:
            PluginError: the hook failed or returned an invalid result.
            UserError, ServerError, RunStopped, Preempted: the error of the context.
        """
        try:
            found = await self._instance.rollout(context)
        except ENDS_THE_RUN:
            raise
        except (Exception, SystemExit) as error:
            raise context.failure or self._failed(error) from error
        if context.failure is not None:
            raise context.failure
        return self._checked_groups(found, context)

    def learn(self, step: int, groups: list[Group]) -> tuple[list[list[TokenAdvantages]], dict[str, float]]:
        """Return the advantages of each trace of each group (None: excluded from the loss), and the user's metrics.

        Raises:
            PluginError: the hook failed or returned an invalid result.
        """
        context = UpdateContext(self._stage, step, self._log, self._plugin)
        found = self._plugin.guarded(lambda: list(self._instance.learn(context, tuple(groups))))
        return self._rows(found, groups), context.metrics

    def kept_problems(self, known: Sequence[str]) -> list[str] | None:
        """Return the ids of the problems for later stages, in the order of `known`; None: the stage selects none.

        `known` has the ids of the stage's problems.

        Raises:
            PluginError: the hook failed, or returned an unknown id.
        """
        found = self._plugin.guarded(self._instance.kept_problems)
        if found is None:
            return None
        kept = self._plugin.guarded(lambda: set(found)) if not isinstance(found, str) else {found}
        if unknown := sorted(map(str, kept - set(known))):
            raise self._plugin.failure(f"kept the problem {unknown[0]!r}, which the stage's `problems` do not have")
        return [problem_id for problem_id in known if problem_id in kept]

    def state(self) -> dict[str, Any]:
        """Return the state of the instance for a checkpoint.

        Raises:
            PluginError: the hook failed, or JSON cannot represent the state.
        """
        found = self._plugin.guarded(self._instance.state_dict)
        try:
            same = isinstance(found, dict) and json.loads(json.dumps(found, allow_nan=False)) == found
        except (TypeError, ValueError):
            same = False
        if not same:
            raise self._plugin.failure(
                "has a state_dict that JSON does not keep as it is; use dicts with text as keys, lists, text and "
                "finite numbers"
            )
        return found

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the instance from the result of `state`.

        Raises:
            PluginError: the hook failed.
        """
        self._plugin.guarded(lambda: self._instance.load_state_dict(state))

    def _checked_groups(self, found: object, context: StepContext) -> list[Group]:
        groups = list(found) if isinstance(found, list | tuple) else []
        if not groups or not all(isinstance(group, Group) and group.samples for group in groups):
            raise self._plugin.failure(f"returned {described(found)} from rollout instead of at least one Group")
        unseen = Counter(map(id, context.traces))
        for group in groups:
            for sample in group.samples:
                if sample.trace.problem_id != group.problem_id or not unseen[id(sample.trace)]:
                    raise self._plugin.failure(
                        f"returned from rollout a group of problem {group.problem_id} with a trace that was not "
                        "sampled for it in this step, or that is there twice"
                    )
                if not isinstance(sample.judgement, Scored | Abstained):
                    raise self._plugin.failure(f"returned from rollout {described(sample.judgement)} as a judgement")
                unseen[id(sample.trace)] -= 1
        return groups

    def _rows(self, learned: Sequence[object], groups: Sequence[Group]) -> list[list[TokenAdvantages]]:
        # Two groups of a problem share the objects of equal traces.
        places = defaultdict[int, list[tuple[int, int]]](list)
        for g, group in enumerate(groups):
            for k, sample in enumerate(group.samples):
                places[id(sample.trace)].append((g, k))
        rows: list[list[TokenAdvantages]] = [[None] * len(group.samples) for group in groups]
        for one in learned:
            if not isinstance(one, LearnedTrace):
                raise self._plugin.failure(f"returned {described(one)} from learn instead of LearnedTrace")
            if not places[id(one.trace)]:
                raise self._plugin.failure(
                    f"returned from learn a trace of problem {one.trace.problem_id} that is not one of the step's, or "
                    "that is there twice"
                )
            g, k = places[id(one.trace)].pop(0)
            rows[g][k] = self._row(one)
        return rows

    def _row(self, learned: LearnedTrace) -> np.ndarray:
        tokens = len(learned.trace.token_ids)
        if self._config.is_supervised != (learned.advantages is None):
            raise self._plugin.failure(
                "returned advantages, which `objective: supervised` does not have; leave them out"
                if self._config.is_supervised
                else "returned a trace without advantages; give them, or set `objective: supervised`"
            )
        if learned.advantages is None:
            return np.ones(tokens, np.float32)
        try:
            row = np.broadcast_to(_numbers(learned.advantages), tokens)
        except (TypeError, ValueError):
            row = np.full(1, np.nan, np.float32)
        if not np.isfinite(row).all():
            raise self._plugin.failure(
                f"returned advantages that are neither a finite number nor {tokens} finite numbers, one for each token"
            )
        return row

    def _failed(self, error: BaseException) -> PluginError:
        place = place_of_error(error, self._plugin.function)
        return PluginError(f"{self._plugin.key}: {self._plugin.path} failed at {place}.")


def _numbers(values: object) -> np.ndarray:
    """Return float32 [...] of one number or of several; NumPy would read text as a number.

    Raises:
        TypeError: there is something else among them.
    """
    found = np.asarray(values)
    if found.dtype.kind not in "biuf":
        raise TypeError(f"not numbers but {found.dtype}")
    return found.astype(np.float32)


class UpdateContext:
    """LearnContext of a step."""

    def __init__(self, stage: GradedStage, step: int, log: Callable[[str], None], plugin: Plugin):
        self.info = StepInfo(stage.name, step)
        self.log = log
        self.metrics: dict[str, float] = {}
        self._stage = stage
        self._plugin = plugin

    def default_learn(self, groups: Sequence[Group]) -> list[LearnedTrace]:
        """See LearnContext.default_learn.

        Raises:
            ValueError: the stage is supervised and has no default, or the groups have different sizes.
        """
        if self._stage.is_supervised:
            raise ValueError("objective is supervised, which has no default: return the traces to learn from")
        if len({len(group.samples) for group in groups}) > 1:
            raise ValueError("default_learn needs groups of one size, and these have several")
        rows = token_advantages(self._stage, list(groups))
        return [
            LearnedTrace(sample.trace, row)
            for group, of_group in zip(groups, rows, strict=True)
            for sample, row in zip(group.samples, of_group, strict=True)
            if row is not None
        ]

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """See LearnContext.log_metrics.

        Raises:
            PluginError: a name or a number is invalid.
        """
        self.metrics |= checked_metrics(self._plugin, metrics)


def custom_stages(config: RunConfig, log: Callable[[str], None]) -> dict[str, StageHooks]:
    """Create the instances of the user's stages, by name of the stage; `log` prints a line for the user.

    Raises:
        PluginError: see StageHooks.
    """
    return {stage.name: StageHooks(stage, log) for stage in config.stages if isinstance(stage, CustomStageConfig)}


def write_kept(directory: Path, stage: str, problem_ids: Sequence[str]) -> None:
    """Write the ids of the problems that `stage` selected for later stages."""
    directory.mkdir(exist_ok=True)
    write_atomically(directory / f"{stage}.json", json.dumps({"problems": list(problem_ids)}).encode())


def read_kept(directory: Path, stage: str) -> frozenset[str]:
    """Read the ids of the problems that `stage` selected for later stages.

    Raises:
        UserError: it selected none.
    """
    path = directory / f"{stage}.json"
    kept = frozenset(json.loads(path.read_bytes())["problems"]) if path.is_file() else frozenset()
    if not kept:
        raise UserError(
            f"Stage {stage} kept no problem in {path} for the stages with problems_from: {stage}; check "
            "what its kept_problems returns."
        )
    return kept
