"""Asynchronous rollouts: the next steps of a stage are sampled and graded while the trainer learns from this one.

With w_t the weights after t steps, step t learns under w_(t-1). Sampling of a step starts when the servers have
w_(t-1-n) or newer weights, where n is the stage's `max_staleness`. Every update then reaches the servers in
mid-generation, and unfinished traces continue under the new weights. So no token is more than n steps old in its
update, and with n = 0 every token is from the current weights. Steps keep their problems and are learned in order,
regardless of when their traces are finished, so that short traces are not preferred.
"""

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

from exprl_megatron.config.stages import RlStage
from exprl_megatron.runs.journal import SampledStep
from exprl_megatron.training.rollouts import Rollouts
from exprl_megatron.utils.required import required
from exprl_megatron.weight_sync.coordinator import RankCoordinator


class InFlightStep(NamedTuple):
    """A step that is being sampled and graded, or is finished and not yet learned from."""

    sampled: Future[SampledStep]
    versions: list[str]
    """Weight versions that its tokens may come from: the one that it started under and all later ones."""


class RolloutPrefetch:
    """The steps in flight; exists on rank 0 and is called from its main thread.

    `on_failure` receives the error of a step immediately, in the event loop's thread, since the main thread may be in a
    collective and take that step much later. The error of the awaited step is raised only by `take`.
    """

    def __init__(self, coordinator: RankCoordinator, rollouts: Rollouts, on_failure: Callable[[BaseException], None]):
        self._coordinator = coordinator
        self._rollouts = rollouts
        self._on_failure = on_failure
        self._in_flight: dict[int, InFlightStep] = {}
        self._awaited: int | None = None
        self._paused = False

    def needs_weights(self, stage: RlStage, step: int, version: str) -> bool:
        """Return whether traces are to be sampled under `version`, the weights that step `step` updates.

        If so, traces in flight are paused, and the caller updates the servers' weights before it calls `start`. Tokens
        of these traces may have this version from then on.
        """
        unfinished = self._allow_version(version)
        if not unfinished and not self._missing(stage, step):
            return False
        if stage.max_staleness:
            # Also if nothing is in flight: the servers may still be paused by a run that was killed.
            self._coordinator.run(self._rollouts.pause_generation())
            self._paused = True
        return True

    def pause(self, version: str) -> None:
        """Pause the traces in flight until `resume`, since the servers get `version` for another purpose than a step.

        Their tokens may have this version from then on, as after `needs_weights`.
        """
        if self._allow_version(version):
            self._coordinator.run(self._rollouts.pause_generation())
            self._paused = True

    def resume(self) -> None:
        """Continue the paused traces under the weights that the servers have now."""
        if self._paused:
            self._coordinator.run(self._rollouts.continue_generation())
            self._paused = False

    def start(self, stage: RlStage, step: int, prompts_consumed: int, version: str) -> Future[SampledStep] | None:
        """Start sampling every step that may be sampled under `version`, which the servers have.

        `prompts_consumed` of the stage's problems were sampled before this step. Returns the future of `step`; None
        where the rollout log has the step.
        """
        self.resume()
        for missing in self._missing(stage, step):
            versions = [version]
            first = prompts_consumed + (missing - step) * stage.prompts_for(stage.problems_per_step)
            sampled = self._coordinator.start(self._rollouts.collect(stage, missing, first, versions))
            self._in_flight[missing] = InFlightStep(sampled, versions)
            sampled.add_done_callback(partial(self._report, missing))
        self._awaited = step
        in_flight = self._in_flight.get(step)
        return None if in_flight is None else in_flight.sampled

    def take(self, stage: RlStage, step: int) -> SampledStep:
        """Wait for a started step and return it; a step that the rollout log has is read from there.

        Raises:
            UserError: see Rollouts.read_logged.
            ServerError: see Rollouts.collect.
            RunStopped: see Rollouts.collect.
        """
        in_flight = self._in_flight.pop(step, None)
        if in_flight is not None:
            return in_flight.sampled.result()
        return required(self._rollouts.read_logged(stage, step), f"step {step} of {stage.name} in the rollout log")

    def _allow_version(self, version: str) -> bool:
        """Allow tokens of `version` in the steps in flight; returns whether any of these steps is unfinished."""
        for in_flight in self._in_flight.values():
            if version not in in_flight.versions:
                in_flight.versions.append(version)
        return any(not in_flight.sampled.done() for in_flight in self._in_flight.values())

    def _missing(self, stage: RlStage, step: int) -> list[int]:
        """Return the steps that may be sampled now and are neither in flight nor in the rollout log."""
        last = min(step + stage.max_staleness, stage.steps)
        steps = (s for s in range(step, last + 1) if s not in self._in_flight)
        return [s for s in steps if not self._rollouts.has_sampled(stage, s)]

    def _report(self, step: int, sampled: Future[SampledStep]) -> None:
        error = sampled.exception()
        if error is not None and step != self._awaited:
            self._on_failure(error)
