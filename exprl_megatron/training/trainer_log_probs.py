"""Keeps the trainer's log-probs of a step's tokens, as its loss has them, and writes them beside the next step.

No forward pass is added: the loss function is wrapped. Each data-parallel rank keeps and writes its own traces.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from exprl_megatron.algorithms.batch import LossFunction, MicroBatch
from exprl_megatron.policy.world import World
from exprl_megatron.runs.log_prob_files import TraceLogProbs, TrainerLogProbFiles

_DEADLINE_S = 600.0
"""For the parts of all ranks, from the moment at which rank 0 has written its own."""

_Kept = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""places [B, 2], mask [B, T] and log-probs [B, T] of a micro-batch."""


class TrainerLogProbs:
    """Exists on every rank; one process of each data-parallel rank writes, and rank 0 completes a step's directory."""

    def __init__(self, root: Path, world: World, is_rank0: bool):
        self.files = TrainerLogProbFiles(root)
        self._part = (world.dp_rank, world.layout.dp)
        self._writes = world.last_stage and world.tp_rank == world.cp_rank == 0
        self._completes = is_rank0
        self._kept: list[_Kept] = []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="trainer-log-probs")
        self._work: Future[None] | None = None
        if is_rank0:
            self.files.discard_unfinished()

    def recorded(self, objective: LossFunction) -> LossFunction:
        """Return `objective`, which also keeps the old log-probs of each micro-batch on the rank that writes them."""
        if not self._writes:
            return objective

        def loss_function(
            log_probs: torch.Tensor, entropy: torch.Tensor, micro: MicroBatch
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            if micro.places is not None:
                # The current ones are a view of a larger tensor, which is not to be kept.
                old = log_probs.detach().clone() if micro.old_log_probs is None else micro.old_log_probs
                self._kept.append((micro.places, micro.mask, old))
            return objective(log_probs, entropy, micro)

        return loss_function

    def write(self, stage: str, step: int) -> None:
        """Start to write what was kept as the step's; raises what the writing of the step before has raised."""
        self.wait()
        kept, self._kept = [(places.cpu(), mask.cpu(), old.cpu()) for places, mask, old in self._kept], []
        self._work = self._pool.submit(self._write, stage, step, kept)

    def wait(self) -> None:
        """Return when everything is on disk. Raises OSError or UserError where that failed."""
        if self._work is not None:
            work, self._work = self._work, None
            work.result()

    def _write(self, stage: str, step: int, kept: list[_Kept]) -> None:
        if self._writes:
            self.files.write_part(stage, step, self._part, rows_of(kept))
        if self._completes:
            self.files.publish(stage, step, self._part[1], _DEADLINE_S)


def rows_of(kept: list[_Kept]) -> list[TraceLogProbs]:
    """Return the log-probs of each trace, without padding, in the order of the rollout log."""
    rows = [
        TraceLogProbs(group, sample, values[present.bool()].numpy())
        for places, mask, log_probs in kept
        for (group, sample), present, values in zip(places.tolist(), mask, log_probs, strict=True)
    ]
    return sorted(rows, key=lambda row: (row.group, row.sample))
