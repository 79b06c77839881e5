"""The training algorithm.

A run is a list of stages. In a stage that learns from its own traces, one step does the following: sample K traces of
each problem under the newest weights; grade each trace as soon as it is finished (ExpRL: a judge grades the whole trace
or its segments; sparse-reward RL: a verifier checks the answer); compute the advantages of each group; take one or more
clipped policy-gradient updates; push the new weights to the sampling servers. A stage with `max_staleness` samples its
next steps in the meantime (prefetch.py). Self-distillation has a teacher instead of advantages. A stage of the user's
own samples, or chooses what is learned, by its own code (custom_stages.py).

Every rank executes this file. Rank 0 alone talks to the servers and holds the graded groups; each rank receives the
training samples that it learns from.
"""

from collections.abc import Sequence

from exprl_megatron.algorithms.aggregation import accepted_denominator, denominator_of
from exprl_megatron.algorithms.batch import SampleOrOutline
from exprl_megatron.algorithms.objective import distillation_objective, policy_objective, supervised_objective
from exprl_megatron.config.stage_kinds import CustomStageConfig
from exprl_megatron.config.stages import RlStage, SelfDistillStage, SftStage
from exprl_megatron.rollout.group import Group
from exprl_megatron.training.run import Batches, Run
from exprl_megatron.training.statistics import step_statistics, update_statistics
from exprl_megatron.training.teacher import student_and_teacher
from exprl_megatron.training.train_samples import update_samples


def run_stages(run: Run) -> None:
    """Run every remaining stage, from the step where the run is to its end."""
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
    """Sample, grade and learn; returns the metrics of the step."""
    groups = run.graded_groups(stage, step)
    metrics = run.on_rank0(lambda: step_statistics(stage, groups) | run.custom_metrics(stage, step, groups)) or {}
    if run.config.debug.only == "sampling":
        return metrics
    with run.clock("log_probs"):
        scattered = run.scattered(lambda: batches_of(run, stage, step, groups))
        batches = [with_log_probs(run, stage, *pair) for pair in scattered]
    with run.clock("train"):
        for batch in batches:
            if batch and stage.is_supervised:
                metrics |= supervised_update(run, batch)
            elif batch:
                metrics |= update(run, stage, batch)
    return metrics


def batches_of(run: Run, stage: RlStage, step: int, groups: list[Group]) -> Sequence[Batches]:
    """Build, for each update, its training samples and the samples that the reference policy scores.

    The two differ only in self-distillation: its reference policy is the teacher, whose prompts include the reference
    solution.
    """
    if isinstance(stage, SelfDistillStage):
        return [student_and_teacher(groups, run.teacher_prompts)]
    version = run.weight_version if stage.max_staleness else None
    advantages = run.custom_advantages(stage, step, groups) if isinstance(stage, CustomStageConfig) else None
    return [(batch, batch) for batch in update_samples(stage, groups, version, advantages)]


def with_log_probs(
    run: Run, stage: RlStage, samples: Sequence[SampleOrOutline], ref_samples: Sequence[SampleOrOutline]
) -> Sequence[SampleOrOutline]:
    """Add the reference policy's log-probs and, where a step has several updates, the old policy's log-probs.

    `ref_samples` are the same responses after the prompts that the reference policy reads.
    """
    if stage.is_supervised:
        return samples
    temperature = stage.sampling.temperature
    if stage.needs_ref_policy and samples:
        ref_log_probs = run.ref_log_probs(ref_samples, temperature)
        samples = [s.with_values("ref_log_probs", lp) for s, lp in zip(samples, ref_log_probs, strict=True)]
    if stage.updates_per_step > 1 and samples:
        old_log_probs = run.policy.log_probs(samples, temperature)
        samples = [s.with_values("old_log_probs", lp) for s, lp in zip(samples, old_log_probs, strict=True)]
    return samples


def update(run: Run, stage: RlStage, samples: Sequence[SampleOrOutline]) -> dict[str, float]:
    """Take one optimizer step on the stage's loss over all `samples`; returns the metrics of the update."""
    if isinstance(stage, SelfDistillStage):
        aggregation, objective = stage.aggregation, distillation_objective(stage.aggregation)
    else:
        aggregation, objective = stage.loss.aggregation, policy_objective(stage.loss)
    denominator = denominator_of(aggregation, samples, stage.sampling.max_new_tokens)
    sums = run.policy.accumulate(samples, run.recorded(objective), stage.sampling.temperature, denominator=denominator)
    # Which tokens the loss rejects is known only now. Where they do not count, the same gradients have a smaller
    # denominator, and the optimizer step rescales them.
    accepted = accepted_denominator(aggregation, sums, stage.sampling.max_new_tokens, denominator)
    metrics = update_statistics(sums, sum(s.response_tokens for s in samples), accepted)
    run.check_update(stage, metrics)
    return metrics | run.apply_update(gradient_scale=denominator / accepted)


def sft_step(run: Run, stage: SftStage, step: int) -> dict[str, float]:
    """Take one optimizer step of maximum likelihood on the next rows of the stage's examples; returns its metrics."""
    samples = run.sft_batch(stage, step)
    with run.clock("train"):
        return supervised_update(run, samples)


def supervised_update(run: Run, samples: Sequence[SampleOrOutline]) -> dict[str, float]:
    """Take one optimizer step of maximum likelihood on the responses of `samples`; returns its metrics."""
    tokens = sum(s.response_tokens for s in samples)
    sums = run.policy.accumulate(samples, supervised_objective(), 1.0, denominator=tokens)
    return update_statistics(sums, tokens) | run.apply_update()
