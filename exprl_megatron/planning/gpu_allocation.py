"""Finds the allocation of GPUs to trainer, sampling servers and judge with the shortest step."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from math import inf

from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.config.stages import Stage
from exprl_megatron.errors import UserError
from exprl_megatron.planning.hardware import Gpu
from exprl_megatron.planning.layouts import Ranking
from exprl_megatron.planning.plan import Plan, allocation_of, plan, ranked
from exprl_megatron.planning.workload import Workload

TRAINER_EIGHTHS = (1, 2, 3, 4, 5, 6)
"""Of all GPUs, that the trainer is tried with."""
JUDGE_EIGHTHS = (1, 2, 3)


def best_allocation(config: RunConfig, stage: Stage, workload: Workload, gpu: Gpu, gpus: int) -> Plan:
    """Return the plan of the config with the best layout and servers, and the ranking of as many trainer GPUs.

    Raises:
        UserError: no allocation fits.
    """

    @cache
    def layouts(trainer: int) -> Ranking | UserError:
        try:
            return ranked(config, stage, workload, gpu, trainer)
        except UserError as error:
            return error

    found: dict[tuple[int, int], Plan] = {}
    reason = None
    for trainer, judge in _allocations(gpus, judged=workload.judgements > 0 and config.required_judge.has_servers):
        ranking = layouts(trainer)
        if isinstance(ranking, UserError):
            reason = ranking
            continue
        laid = config.model_copy(update={"policy": ranking.layouts[0].policy})
        for tried in _served(laid, gpus - trainer - judge, judge):
            planned = plan(tried, stage, workload, gpu)
            if planned.faults:
                reason = UserError("\n".join(planned.faults))
            elif planned.step_s < _step_s(found.get((trainer, judge))):
                found[trainer, judge] = replace(planned, given=config, ranking=ranking)
    if not found:
        raise UserError(
            f"{gpus} {gpu.name} do not hold trainer and servers of {config.policy.model}, however they are divided. "
            f"With the largest trainer that was tried: {reason or 'too few GPUs are left for the servers.'}"
        )
    plans = sorted(found.values(), key=_step_s)
    return replace(plans[0], allocations=tuple(map(allocation_of, plans)))


def _step_s(plan: Plan | None) -> float:
    return inf if plan is None else plan.step_s


def _allocations(gpus: int, judged: bool) -> Iterator[tuple[int, int]]:
    """Yield (trainer, judge) GPUs; the rest samples."""
    for eighths in TRAINER_EIGHTHS:
        for judging in JUDGE_EIGHTHS if judged else (0,):
            trainer, judge = gpus * eighths // 8, gpus * judging // 8
            if trainer and trainer + judge < gpus and (judge or not judged):
                yield trainer, judge


def _served(config: RunConfig, sampling: int, judging: int) -> Iterator[RunConfig]:
    """Yield the config with those GPUs in equal servers of every size."""
    for server in _servers(config.server, sampling, apart=int(config.has_ref_server)):
        served = config.model_copy(update={"server": server})
        if not judging:
            yield served
            continue
        for judge_server in _servers(config.required_judge.server, judging):
            judge = config.required_judge.model_copy(update={"server": judge_server})
            yield served.model_copy(update={"judge": judge})


def _servers(server: ServerConfig, gpus: int, apart: int = 0) -> list[ServerConfig]:
    """Return the servers of every size on `gpus`, leaving GPUs for `apart` more of their kind."""
    sizes = [tp for tp in (1, 2, 4, 8) if gpus % tp == 0 and gpus // tp > apart]
    return [server.model_copy(update={"count": gpus // tp - apart, "tp": tp}) for tp in sizes]
