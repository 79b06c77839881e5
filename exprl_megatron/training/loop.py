"""The algorithm.

A run is a list of stages. In a stage that learns from its own traces, one step is: sample K traces of each
problem under the newest weights; grade each trace as soon as it is finished (judge: ExpRL; verifier:
sparse-reward RL); turn the grades of a group into advantages; take one or more clipped policy-gradient
steps; send the new weights to the samplers. Every rank executes this file; rank 0 talks to the servers.
"""

from dataclasses import replace

from exprl_megatron.algorithms.objective import policy_objective, supervised_objective
from exprl_megatron.config.stages import RlStage, SftStage
from exprl_megatron.policy.batch import Sequence
from exprl_megatron.rollout.group import Group
from exprl_megatron.training.run import Run
from exprl_megatron.training.sequences import sequences_of
from exprl_megatron.training.statistics import group_statistics, update_statistics


def run_stages(run: Run) -> None:
    """From wherever the run stands to its end."""
    run.evaluate("start")
    for stage in run.remaining_stages():
        run.open_stage(stage)
        for step in run.remaining_steps(stage):
            with run.step(stage, step) as metrics:
                if isinstance(stage, SftStage):
                    metrics |= sft_step(run, stage, step)
                else:
                    metrics |= rl_step(run, stage, step)
            run.checkpoint_if_due(stage, step)
        run.close_stage(stage)
        run.evaluate(stage.name)


def rl_step(run: Run, stage: RlStage, step: int) -> dict[str, float]:
    """Sample, grade, learn; the step's metrics."""
    groups = run.graded_groups(stage, step)
    metrics = group_statistics(groups)
    parts = [sequences_of(stage, part) for part in split(groups, stage.updates_per_step)]
    with run.clock("log_probs"):
        parts = [with_log_probs(run, stage, part) for part in parts]
    with run.clock("train"):
        for part in parts:
            if part:
                metrics |= update(run, stage, part)
    return metrics


def with_log_probs(run: Run, stage: RlStage, sequences: list[Sequence]) -> list[Sequence]:
    """Add the log-probs under the stage's starting policy and, where a step has several updates, the old ones."""
    temperature = stage.sampling.temperature
    if stage.loss.kl_coefficient > 0 and sequences:
        start = run.policy.log_probs(sequences, temperature, start=True)
        sequences = [replace(s, start_log_probs=tuple(lp)) for s, lp in zip(sequences, start, strict=True)]
    if stage.updates_per_step > 1 and sequences:
        old = run.policy.log_probs(sequences, temperature)
        sequences = [replace(s, old_log_probs=tuple(lp)) for s, lp in zip(sequences, old, strict=True)]
    return sequences


def update(run: Run, stage: RlStage, sequences: list[Sequence]) -> dict[str, float]:
    """One optimizer step; the loss is the mean over all response tokens of `sequences`."""
    tokens = sum(len(s.response_ids) for s in sequences)
    objective = policy_objective(stage.loss)
    sums = run.policy.accumulate(sequences, objective, stage.sampling.temperature, denominator=tokens)
    metrics = update_statistics(sums, tokens)
    run.check_log_prob_gap(metrics)
    return metrics | run.apply_update()


def sft_step(run: Run, stage: SftStage, step: int) -> dict[str, float]:
    """One optimizer step of maximum likelihood on the next rows of the stage's examples."""
    sequences = run.sft_batch(stage, step)
    tokens = sum(len(s.response_ids) for s in sequences)
    with run.clock("train"):
        sums = run.policy.accumulate(sequences, supervised_objective(), 1.0, denominator=tokens)
        return update_statistics(sums, tokens) | run.apply_update()


def split(groups: list[Group], parts: int) -> list[list[Group]]:
    """`groups` in `parts` runs of equal length."""
    size = len(groups) // parts
    return [groups[i * size : (i + 1) * size] for i in range(parts)]
