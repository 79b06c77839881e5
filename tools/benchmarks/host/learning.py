"""From graded groups to sequences with advantages, and the statistics of the step."""

from collections.abc import Callable

from benchmarks.host.station import Station
from benchmarks.host.workload import GROUP, Workload
from exprl_megatron.config.problems import ProblemsConfig
from exprl_megatron.config.stages import ExprlProcessStage
from exprl_megatron.training.statistics import group_statistics
from exprl_megatron.training.train_samples import update_samples


def prepare(workload: Workload) -> Callable[[], object]:
    """Both, for a stage with process rewards."""
    groups = workload.groups
    stage = ExprlProcessStage(
        kind="exprl-process",
        name="prime",
        steps=1,
        problems=ProblemsConfig(source="problems.jsonl"),
        problems_per_step=len(groups),
        group_size=GROUP,
    )
    return lambda: (group_statistics(groups, judged=True), update_samples(stage, groups))


STATION = Station("statistics and advantages", blocks=True, prepare=prepare)
