"""What a run saves of its policy: checkpoints, and the weights at the end of each stage."""

import shutil
from pathlib import Path
from typing import Any, cast

from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.stage_kinds import CustomStageConfig
from exprl_megatron.config.stages import RlStage, Stage
from exprl_megatron.policy.checkpoint import load_checkpoint, save_checkpoint
from exprl_megatron.policy.policy import Policy
from exprl_megatron.runs.directory import RunDirectory
from exprl_megatron.runs.progress import CUSTOM_STAGE, RunProgress, custom_stage_state
from exprl_megatron.training.rollouts import Rollouts
from exprl_megatron.training.trainer_log_probs import TrainerLogProbs
from exprl_megatron.weight_sync.coordinator import RankCoordinator


class RunSaves:
    """The saves of `policy` on this rank; every rank calls the same methods in the same order.

    Args:
        config: the config of the run.
        directory: its directory.
        policy: the policy.
        coordinator: connects the ranks.
        rollouts: has the stages of the user's own and the rollout log; used on rank 0 only.
        trainer_log_probs: the files of the trainer's log-probs, if the run writes them.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        policy: Policy,
        coordinator: RankCoordinator,
        rollouts: Rollouts,
        trainer_log_probs: TrainerLogProbs | None,
    ):
        self._config = config
        self._directory = directory
        self._policy = policy
        self._coordinator = coordinator
        self._rollouts = rollouts
        self._trainer_log_probs = trainer_log_probs

    def load_checkpoint(self, path: Path, stage: Stage) -> None:
        """Load the policy's state, and that of a stage of the user's own, from a checkpoint within `stage`."""
        record = load_checkpoint(path, self._policy)
        if isinstance(stage, CustomStageConfig):
            state = custom_stage_state(record)
            self._coordinator.on_rank0(lambda: self._rollouts.custom_stage(stage).load_state(state))

    def save_checkpoint(self, stage: Stage, progress: RunProgress) -> None:
        """Write a checkpoint of the run, which is `progress` far."""
        if self._trainer_log_probs is not None:
            # A resumed run does not repeat the steps before the checkpoint.
            self._trainer_log_probs.wait()
        record = self._record(stage, progress)
        save_checkpoint(self._directory.checkpoints, self._policy, record, keep=self._config.checkpoint.keep)

    def prune_logs(self, stage: RlStage, step: int) -> None:
        """Delete, on rank 0 after a checkpoint of step `step`, the logs that `journal.keep_steps` does not keep."""
        self._rollouts.prune_log(stage, step)
        if self._trainer_log_probs is not None and self._config.journal.keep_steps is not None:
            self._trainer_log_probs.files.keep_newest(stage.name, step, self._config.journal.keep_steps)

    def save_stage(self, stage: Stage, learned: bool) -> None:
        """Write the weights at the end of `stage` in Hugging Face format, and the problems that a user's stage kept.

        Where nothing was `learned` in this process and the weights are there already, they are not written again.
        """
        if isinstance(stage, CustomStageConfig):
            rl_stage = cast(RlStage, stage)
            self._coordinator.on_rank0(
                lambda: self._rollouts.problems.write_kept(rl_stage, self._rollouts.custom_stage(rl_stage))
            )
        target = self._directory.models / stage.name
        if not learned and self._coordinator.broadcast_from_rank0(target.is_dir):
            return
        # A run that resumed from an older checkpoint, since a newer one was damaged, already has a model of this stage.
        former = target.with_name(target.name + ".former")
        self._coordinator.on_rank0(lambda: _rename(target, former))
        self._policy.save_huggingface(target)
        self._coordinator.on_rank0(lambda: shutil.rmtree(former, ignore_errors=True))

    def _record(self, stage: Stage, progress: RunProgress) -> dict[str, Any]:
        """Return what a checkpoint has beside the policy; rank 0's counts."""
        record = progress.to_dict()
        if isinstance(stage, CustomStageConfig):
            record[CUSTOM_STAGE] = self._coordinator.on_rank0(lambda: self._rollouts.custom_stage(stage).state()) or {}
        return record


def _rename(directory: Path, name: Path) -> None:
    """Rename `directory` to `name`, which is deleted first; does nothing where there is no `directory`."""
    if directory.is_dir():
        shutil.rmtree(name, ignore_errors=True)
        directory.rename(name)
