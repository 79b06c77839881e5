"""The algorithm.

A run is a list of stages. In a stage that learns from its own traces, one step is: sample K traces of each
problem under the newest weights; grade each trace as soon as it is finished (judge, whole or by segments:
ExpRL; verifier: sparse-reward RL); turn the grades of a group into advantages; take one or more clipped
policy-gradient steps; send the new weights to the samplers. Where a stage allows it the next steps are sampled
meanwhile (ahead.py). Self-distillation has a teacher in the place of advantages. Every rank executes this file; rank 0
talks to the servers, has the graded groups, and gives each rank the sequences that it learns from.
"""

from exprl_megatron.algorithms.aggregation import denominator, kept_denominator
from exprl_megatron.algorithms.batch import LearnedFrom, Sequence
from exprl_megatron.algorithms.objective import distillation_objective, policy_objective, supervised_objective
from exprl_megatron.config.stages import RlStage, SelfDistillStage, SftStage
from exprl_megatron.rollout.group import Group
from exprl_megatron.training.run import Run
from exprl_megatron.training.sequences import update_sequences
from exprl_megatron.training.statistics import step_statistics, update_statistics
from exprl_megatron.training.teacher import student_and_teacher


def run_stages(run: Run) -> None:
    """From wherever the run stands to its end."""
    run.evaluate()
    for stage in run.remaining_stages():
        run.open_stage(stage)
        for step in run.remaining_steps(stage):
            run.evaluate(stage, step - 1)
            with run.step(stage, step) as metrics:
                if isinstance(stage, SftStage):
                    metrics |= sft_step(run, stage, step)
                else:
                    metrics |= rl_step(run, stage, step)
            run.checkpoint_if_due(stage, step)
        run.close_stage(stage)
        run.evaluate(stage)


def rl_step(run: Run, stage: RlStage, step: int) -> dict[str, float]:
    """Sample, grade, learn; the step's metrics."""
    groups = run.graded_groups(stage, step)
    metrics = run.on_rank0(lambda: step_statistics(stage, groups)) or {}
    if run.config.debug.only == "sampling":
        return metrics
    with run.clock("log_probs"):
        batches = run.scattered(lambda: batches_of(run, stage, groups))
        batches = [with_log_probs(run, stage, *batch) for batch in batches]
    with run.clock("train"):
        for batch in batches:
            if batch:
                metrics |= update(run, stage, batch)
    return metrics


def batches_of(run: Run, stage: RlStage, groups: list[Group]) -> list[tuple[list[Sequence], list[Sequence]]]:
    """For each update the sequences to learn from, and the same as the stage's starting policy reads them.

    That differs in self-distillation alone, where it is the teacher and has the reference in its prompts.
    """
    if isinstance(stage, SelfDistillStage):
        return [student_and_teacher(groups, run.teacher_prompts)]
    version = run.weight_version if stage.max_staleness else None
    return [(batch, batch) for batch in update_sequences(stage, groups, version)]


def with_log_probs(
    run: Run, stage: RlStage, sequences: list[LearnedFrom], as_start_reads: list[LearnedFrom]
) -> list[LearnedFrom]:
    """Add the log-probs under the stage's starting policy and, where a step has several updates, the old ones."""
    temperature = stage.sampling.temperature
    if stage.needs_start and sequences:
        start = run.start_log_probs(as_start_reads, temperature)
        sequences = [s.with_values("start_log_probs", lp) for s, lp in zip(sequences, start, strict=True)]
    if stage.updates_per_step > 1 and sequences:
        old = run.policy.log_probs(sequences, temperature)
        sequences = [s.with_values("old_log_probs", lp) for s, lp in zip(sequences, old, strict=True)]
    return sequences


def update(run: Run, stage: RlStage, sequences: list[LearnedFrom]) -> dict[str, float]:
    """One optimizer step on the stage's loss, aggregated over all of `sequences` as the stage says."""
    if isinstance(stage, SelfDistillStage):
        aggregation, objective = stage.aggregation, distillation_objective(stage.aggregation)
    else:
        aggregation, objective = stage.loss.aggregation, policy_objective(stage.loss)
    whole = denominator(aggregation, sequences, stage.sampling.max_new_tokens)
    sums = run.policy.accumulate(sequences, objective, stage.sampling.temperature, denominator=whole)
    # What the loss rejects is known now: where it does not count, the same gradients have a smaller denominator.
    kept = kept_denominator(aggregation, sums, stage.sampling.max_new_tokens, whole)
    metrics = update_statistics(sums, sum(s.response_tokens for s in sequences), kept)
    run.check_update(stage, metrics)
    return metrics | run.apply_update(gradient_scale=whole / kept)


def sft_step(run: Run, stage: SftStage, step: int) -> dict[str, float]:
    """One optimizer step of maximum likelihood on the next rows of the stage's examples."""
    sequences = run.sft_batch(stage, step)
    tokens = sum(s.response_tokens for s in sequences)
    with run.clock("train"):
        sums = run.policy.accumulate(sequences, supervised_objective(), 1.0, denominator=tokens)
        return update_statistics(sums, tokens) | run.apply_update()
