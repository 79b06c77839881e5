"""The planner's entry point: from the command line's arguments to a plan."""

from dataclasses import replace

from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.stages import Stage
from exprl_megatron.errors import UserError
from exprl_megatron.planning.gpu_allocation import best_allocation
from exprl_megatron.planning.hardware import Gpu
from exprl_megatron.planning.layouts import Ranking
from exprl_megatron.planning.plan import Plan, plan, ranked, with_syncs
from exprl_megatron.planning.targets import find_config
from exprl_megatron.planning.training_time import check_precision
from exprl_megatron.planning.workload import Workload, workload_of


def plan_target(
    target: str,
    overrides: list[str],
    gpu: Gpu,
    *,
    gpus: int | None = None,
    judge: str | None = None,
    train_only: bool = False,
    stage_name: str | None = None,
    lengths: tuple[float | None, float | None] = (None, None),
) -> Plan:
    """Plan a config as it is, or, with `gpus`, the best allocation and layout of that number of GPUs.

    With `gpus`, they are divided between trainer and servers, unless `train_only`. `lengths`: mean tokens of a prompt
    and of a response.

    Raises: UserError where there is nothing to plan or nothing fits.

    More than 7 parameters: they are the options of `exprl plan`.
    """
    config, real = find_config(target, overrides, judge)
    if real and judge is not None:
        raise UserError("--judge is for models; a config names its own judge.")
    check_precision(config.policy.precision, gpu)
    stage = _stage(config, stage_name)
    workload = workload_of(config, stage, *lengths)
    if train_only:
        workload = replace(workload, sampled=False, judgements=0)
    if gpus is None:
        here = plan(config, stage, workload, gpu)
        return with_syncs(replace(here, ranking=_ranking(config, stage, workload, gpu, here.gpus["trainer"])))
    if workload.sampled:
        return with_syncs(best_allocation(config, stage, workload, gpu, gpus))
    ranking = ranked(config, stage, workload, gpu, gpus)
    best = config.model_copy(update={"policy": ranking.layouts[0].policy})
    return replace(plan(best, stage, workload, gpu), given=config, ranking=ranking)


def _ranking(config: RunConfig, stage: Stage, workload: Workload, gpu: Gpu, gpus: int) -> Ranking | None:
    """Return the ranking, or None where nothing fits; the plan's faults report that."""
    try:
        return ranked(config, stage, workload, gpu, gpus)
    except UserError:
        return None


def _stage(config: RunConfig, name: str | None) -> Stage:
    if name is None:
        return config.stages[0]
    for stage in config.stages:
        if stage.name == name:
            return stage
    names = ", ".join(stage.name for stage in config.stages)
    raise UserError(f"There is no stage {name}; the config has {names}.")
