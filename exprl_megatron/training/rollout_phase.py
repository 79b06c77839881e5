"""The phase of a step in which the servers sample, as every rank takes part in it.

Rank 0 waits for the servers, and all ranks wait for rank 0 in short turns: so they stay in contact, and can send the
weights to servers that register in the meantime.
"""

from concurrent.futures import Future

from exprl_megatron.config.stages import RlStage
from exprl_megatron.errors import Preempted
from exprl_megatron.reporting.timeline import ROLLOUTS
from exprl_megatron.runs.journal import SampledStep
from exprl_megatron.training.evaluator import Evaluator
from exprl_megatron.training.first_update import AssertionCounts
from exprl_megatron.training.phase_switch import PhaseSwitch
from exprl_megatron.training.prefetch import RolloutPrefetch
from exprl_megatron.training.rollouts import Rollouts
from exprl_megatron.training.step_record import StepRecord
from exprl_megatron.weight_sync.coordinator import RankCoordinator


class RolloutPhase:
    """Sampling and evaluation on this rank; every rank calls the same methods in the same order.

    Args:
        coordinator: connects the ranks.
        phases: sends weights and switches between training and sampling.
        rollouts: the servers; used on rank 0 only, as `prefetch` is.
        prefetch: the steps in flight.
        record: receives seconds and metrics.
        assertions: counts the syncs.
    """

    def __init__(
        self,
        coordinator: RankCoordinator,
        phases: PhaseSwitch,
        rollouts: Rollouts,
        prefetch: RolloutPrefetch,
        record: StepRecord,
        assertions: AssertionCounts,
    ):
        self._coordinator = coordinator
        self._phases = phases
        self._rollouts = rollouts
        self._prefetch = prefetch
        self._record = record
        self._assertions = assertions

    def sample(self, stage: RlStage, step: int, prompts_consumed: int, version: str) -> SampledStep | None:
        """Return the step on rank 0, None elsewhere: from the rollout log, or sampled under the weights `version`.

        `prompts_consumed` of the stage's problems were sampled before.
        """
        if self._coordinator.broadcast_from_rank0(lambda: self._prefetch.needs_weights(stage, step, version)):
            with self._record.clock("sync"):
                self._sync_weights(version)
        with self._record.clock(ROLLOUTS):
            work = self._coordinator.on_rank0(lambda: self._prefetch.start(stage, step, prompts_consumed, version))
            while (waiting := self._waiting_for(work)) != "done":
                if waiting == "weights":
                    self._sync_weights(version)
            sampled = self._coordinator.on_rank0(lambda: self._prefetch.take(stage, step))
            self._coordinator.broadcast_run(lambda: self._rollouts.check_served())
        self._phases.switch_to_training()
        return sampled

    def evaluate(self, evaluator: Evaluator, name: str, version: str) -> None:
        """Evaluate the weights `version` as `name`; steps in flight continue under these weights in the meantime.

        Raises:
            Preempted: the run was asked to stop; a resumed run repeats the evaluation.
        """
        self._coordinator.broadcast_from_rank0(lambda: self._prefetch.pause(version))
        self._sync_weights(version)
        self._coordinator.broadcast_from_rank0(lambda: self._prefetch.resume())
        work = self._coordinator.on_rank0(lambda: self._coordinator.start(evaluator.evaluate(name, version)))
        while (waiting := self._waiting_for(work)) != "done":
            if waiting == "weights":
                self._sync_weights(version)
            elif self._coordinator.asked_to_stop():
                self._coordinator.on_rank0(lambda: work.cancel())
                raise Preempted(
                    f"The run was asked to stop and did so in the evaluation of {name}; "
                    "continue with --resume, which repeats it."
                )
        self._coordinator.broadcast_from_rank0(lambda: work.result())
        self._phases.switch_to_training()

    def _sync_weights(self, version: str) -> None:
        """Send the policy's weights to the servers that lack them."""
        metrics = self._phases.sync_weights(version)
        self._assertions.synced(metrics)
        self._record.synced(metrics)

    def _waiting_for(self, work: Future | None) -> str:
        """Wait briefly for rank 0's `work` with the servers; returns its state on every rank (see ServerPool.wait_for).

        It is called in a loop, so that the ranks stay in contact regardless of how long the work takes.
        """
        return self._coordinator.broadcast_from_rank0(
            lambda: "done" if work is None else self._coordinator.run(self._rollouts.wait_for(work))
        )
