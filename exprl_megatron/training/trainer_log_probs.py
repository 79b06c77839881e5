"""Records the trainer's log-probs of a step's tokens in its loss, and writes them while the next step runs.

No forward pass is added: the loss function is wrapped. Each data-parallel rank records and writes its own traces.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from exprl_megatron.algorithms.batch import LossFunction, MicroBatch
from exprl_megatron.policy.world import World
from exprl_megatron.runs.log_prob_files import TraceLogProbs, TrainerLogProbFiles

_DEADLINE_S = 600.0
"""Seconds for the parts of all ranks, from the moment when rank 0 has written its own."""

_Recorded = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""places [B, 2], mask [B, T] and log-probs [B, T] of a micro-batch."""


class TrainerLogProbs:
    """Exists on every rank; one process of each data-parallel rank writes, and rank 0 completes a step's directory."""

    def __init__(self, root: Path, world: World, is_rank0: bool):
        self.files = TrainerLogProbFiles(root)
        self._part = (world.dp_rank, world.layout.dp)
        self._writes = world.last_stage and world.tp_rank == world.cp_rank == 0
        self._completes = is_rank0
        self._recorded: list[_Recorded] = []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="trainer-log-probs")
        self._work: Future[None] | None = None
        if is_rank0:
            self.files.discard_unfinished()

    def recorded(self, objective: LossFunction) -> LossFunction:
        """Wrap `objective` so that it also records the old log-probs of each micro-batch on the ranks that write."""
        if not self._writes:
            return objective

        def loss_function(
            log_probs: torch.Tensor, entropy: torch.Tensor, micro: MicroBatch
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            if micro.places is not None:
                # The current ones are a view of a larger tensor, which must not stay in memory.
                old = log_probs.detach().clone() if micro.old_log_probs is None else micro.old_log_probs
                self._recorded.append((micro.places, micro.mask, old))
            return objective(log_probs, entropy, micro)

        return loss_function

    def write(self, stage: str, step: int) -> None:
        """Start to write the recorded log-probs of the step.

        Raises:
            OSError, UserError: the previous step could not be written.
        """
        self.wait()
        recorded = [(places.cpu(), mask.cpu(), old.cpu()) for places, mask, old in self._recorded]
        self._recorded = []
        self._work = self._pool.submit(self._write, stage, step, recorded)

    def wait(self) -> None:
        """Wait until everything is on disk.

        Raises:
            OSError, UserError: a step could not be written.
        """
        if self._work is not None:
            work, self._work = self._work, None
            work.result()

    def _write(self, stage: str, step: int, recorded: list[_Recorded]) -> None:
        if self._writes:
            self.files.write_part(stage, step, self._part, trace_rows(recorded))
        if self._completes:
            self.files.publish(stage, step, self._part[1], _DEADLINE_S)


def trace_rows(recorded: list[_Recorded]) -> list[TraceLogProbs]:
    """Return the log-probs of each trace, without padding, in the order of the rollout log."""
    rows = [
        TraceLogProbs(group, sample, values[present.bool()].numpy())
        for places, mask, log_probs in recorded
        for (group, sample), present, values in zip(places.tolist(), mask, log_probs, strict=True)
    ]
    return sorted(rows, key=lambda row: (row.group, row.sample))
