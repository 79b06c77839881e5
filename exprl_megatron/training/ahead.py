"""Sampling ahead: the next steps of a stage are sampled and graded while the trainer learns from this one.

With w_t the weights that t steps left, step t learns under w_(t-1). Its traces are begun when the servers hold
w_(t-1-n) or newer, n being the stage's `max_staleness`; each update then reaches the servers in mid-generation, and a
trace goes on under the new weights. So no token is older than n steps when it is learned from, and with n = 0 every
token is of the weights that learn. Steps keep their problems and are learned in their order, however soon their
traces are finished: short traces gain no weight.
"""

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

from exprl_megatron.config.stages import RlStage
from exprl_megatron.runs.journal import SampledStep
from exprl_megatron.training.rollouts import Rollouts
from exprl_megatron.weight_sync.conductor import Conductor


class UnderWay(NamedTuple):
    """A step that is being sampled and graded, or waits to be learned from."""

    sampled: Future[SampledStep]
    versions: list[str]
    """Of the weights that its tokens may come from: those it was begun under, and all that followed."""


class Ahead:
    """The steps under way; lives on rank 0, and is called from its main thread.

    `on_failure` gets the error of a step at once, in the conductor's thread: the main one may be deep in a collective,
    and asks for that step much later. The error of the step that is waited for is raised there alone.
    """

    def __init__(self, conductor: Conductor, rollouts: Rollouts, on_failure: Callable[[BaseException], None]):
        self._conductor = conductor
        self._rollouts = rollouts
        self._on_failure = on_failure
        self._under_way: dict[int, UnderWay] = {}
        self._awaited: int | None = None
        self._held = False

    def announce(self, stage: RlStage, step: int, version: str) -> bool:
        """Before step `step` learns under `version`: whether anything is to be sampled under these weights.

        If so, they must be on the servers before `begin`. Traces under way are held until then, and may be of this
        version from there on.
        """
        unfinished = self._expect(version)
        if not unfinished and not self._missing(stage, step):
            return False
        if stage.max_staleness:
            # Also where nothing is under way: a run that was killed may have left the servers held.
            self._conductor.run(self._rollouts.hold())
            self._held = True
        return True

    def pause(self, version: str) -> None:
        """Before the servers get `version` for something other than a step: hold the traces under way until `resume`.

        They may be of this version from there on, as after `announce`.
        """
        if self._expect(version):
            self._conductor.run(self._rollouts.hold())
            self._held = True

    def resume(self) -> None:
        """Let the traces go on that are held, under the weights that the servers hold now."""
        if self._held:
            self._conductor.run(self._rollouts.go_on())
            self._held = False

    def begin(self, stage: RlStage, step: int, drawn: int, version: str) -> Future[SampledStep] | None:
        """Begin all that may be begun under `version`, which the servers hold; step `step`'s work, if it is under way.

        `drawn` problems of the stage were drawn before this step.
        """
        self.resume()
        for missing in self._missing(stage, step):
            versions = [version]
            first = drawn + (missing - step) * stage.drawn_for(stage.problems_per_step)
            sampled = self._conductor.start(self._rollouts.collect(stage, missing, first, versions))
            self._under_way[missing] = UnderWay(sampled, versions)
            sampled.add_done_callback(partial(self._report, missing))
        self._awaited = step
        under_way = self._under_way.get(step)
        return None if under_way is None else under_way.sampled

    def take(self, stage: RlStage, step: int) -> SampledStep:
        """Wait for step `step`, which was begun; a step that the journal has is taken from there.

        Raises what Rollouts.collect and recall do.
        """
        under_way = self._under_way.pop(step, None)
        return self._rollouts.recall(stage, step) if under_way is None else under_way.sampled.result()

    def _expect(self, version: str) -> bool:
        """Note that tokens of the steps under way may be of `version`; whether any of these is unfinished."""
        for under_way in self._under_way.values():
            if version not in under_way.versions:
                under_way.versions.append(version)
        return any(not under_way.sampled.done() for under_way in self._under_way.values())

    def _missing(self, stage: RlStage, step: int) -> list[int]:
        """The steps that may be begun, and are neither under way nor in the journal."""
        last = min(step + stage.max_staleness, stage.steps)
        steps = (s for s in range(step, last + 1) if s not in self._under_way)
        return [s for s in steps if not self._rollouts.has_sampled(stage, s)]

    def _report(self, step: int, sampled: Future[SampledStep]) -> None:
        error = sampled.exception()
        if error is not None and step != self._awaited:
            self._on_failure(error)
