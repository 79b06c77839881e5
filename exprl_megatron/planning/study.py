"""From what the command line names to a finished plan."""

from dataclasses import replace

from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.stages import Stage
from exprl_megatron.errors import UserError
from exprl_megatron.planning.hardware import Gpu
from exprl_megatron.planning.layouts import rank_layouts
from exprl_megatron.planning.plan import Plan, plan, ranked
from exprl_megatron.planning.split import best_division
from exprl_megatron.planning.targets import find_architecture, find_config
from exprl_megatron.planning.workload import Workload, workload_of


def study(
    target: str,
    overrides: list[str],
    gpu: Gpu,
    *,
    gpus: int | None = None,
    judge: str | None = None,
    train_only: bool = False,
    stage_name: str | None = None,
    lengths: tuple[float | None, float | None] = (None, None),
    top: int = 8,
) -> Plan:
    """The plan of a config as it is, or, with `gpus`, of the best that so many GPUs can do.

    A config keeps its servers, and the remaining GPUs train; around a model's name GPUs are divided between trainer
    and servers too, unless `train_only`. `lengths`: mean tokens of a prompt and of a response. Raises UserError where
    there is nothing to plan or nothing fits.
    """
    config, real = find_config(target, overrides, judge)
    if real and judge is not None:
        raise UserError("--judge is for models; a config names its own judge.")
    stage = _stage(config, stage_name)
    workload = workload_of(config, stage, *lengths)
    if train_only:
        workload = replace(workload, sampled=False, judgements=0)
    if gpus is None:
        here = plan(config, stage, workload, gpu)
        return replace(here, ranking=ranked(config, stage, workload, gpu, here.gpus["trainer"], top))
    if workload.sampled and not real:
        _, planned, layouts = best_division(config, stage, workload, gpu, gpus, top)
        return replace(planned, ranking=layouts)
    return _with_best_layout(config, stage, workload, gpu, gpus, top)


def _with_best_layout(config: RunConfig, stage: Stage, workload: Workload, gpu: Gpu, gpus: int, top: int) -> Plan:
    """The config's servers, and the rest of the GPUs in the best layout."""
    trainer = gpus - (_served(config, workload) if workload.sampled else 0)
    if trainer < 1:
        raise UserError(
            f"The config's servers take {gpus - trainer} of {gpus} GPUs; raise --gpus, or lower their count."
        )
    architecture, _ = find_architecture(config.policy.model)
    layouts = rank_layouts(architecture, config.policy, stage.optimizer, workload, gpu, trainer)
    if not layouts:
        raise UserError(
            f"{trainer} {gpu.name} cannot hold the trainer of {config.policy.model} in any layout; take more GPUs, a "
            "larger one, or optimizer.offload."
        )
    best = config.model_copy(update={"policy": layouts[0].policy})
    return replace(plan(best, stage, workload, gpu), ranking=layouts[:top])


def _served(config: RunConfig, workload: Workload) -> int:
    judged = workload.judgements > 0 and not config.judge.endpoints
    servers = config.server.count + int(workload.keeps_start and config.policy.starting_policy == "server")
    judges = config.judge.server.count * config.judge.server.tp if judged else 0
    return servers * config.server.tp + judges


def _stage(config: RunConfig, name: str | None) -> Stage:
    if name is None:
        return config.stages[0]
    for stage in config.stages:
        if stage.name == name:
            return stage
    names = ", ".join(stage.name for stage in config.stages)
    raise UserError(f"There is no stage {name}; the config has {names}.")
