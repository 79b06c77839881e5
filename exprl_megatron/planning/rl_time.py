"""Seconds of a reinforcement-learning step by phase; docs/time_model.md explains each."""

from dataclasses import dataclass

from exprl_megatron.models.architecture import Architecture
from exprl_megatron.planning.hardware import Gpu
from exprl_megatron.planning.links import NVLINK_EFFICIENCY
from exprl_megatron.planning.serving_time import LengthDistribution, ServerHardware, ServingTime, serving_time
from exprl_megatron.planning.training_time import TrainingTime

VARIABLE_LENGTH_SLOWDOWN = 1.24
"""Calibrated (docs/time_model.md): log-probs and training on packed traces of many lengths, with losses and statistics
of reinforcement learning, against full sequences of pre-training."""


@dataclass(frozen=True)
class PlannedStepTime:
    """Seconds of one step's phases."""

    sampling_s: float
    judging_s: float
    log_probs_s: float
    training_s: float
    reshard_s: float
    save_s: float = 0.0
    one_step_off: bool = False
    """Whether servers on their own devices already sample for the next step."""

    @property
    def total_s(self) -> float:
        """Seconds from one update to the next: phases in turn, or the slower side, then the new weights."""
        experience = self.sampling_s + self.judging_s
        learning = self.log_probs_s + self.training_s + self.save_s
        both = max(experience, learning) if self.one_step_off else experience + learning
        return both + self.reshard_s


def step_time(
    *,
    sampling: ServingTime,
    judging_s: float,
    log_probs: list[TrainingTime],
    training: TrainingTime,
    reshard_s: float,
    save_s: float = 0.0,
    one_step_off: bool = False,
) -> PlannedStepTime:
    """Return the step of these phases; `log_probs` has one forward pass for each policy that is scored by the trainer.

    `judging_s` is what judging adds to sampling (see `judging_tail`), `save_s` a checkpoint's share of a step.
    """
    return PlannedStepTime(
        sampling_s=sampling.total_s,
        judging_s=judging_s,
        log_probs_s=VARIABLE_LENGTH_SLOWDOWN * sum(one.total_s for one in log_probs),
        training_s=VARIABLE_LENGTH_SLOWDOWN * training.total_s,
        reshard_s=reshard_s,
        save_s=save_s,
        one_step_off=one_step_off,
    )


def sampling_time(
    architecture: Architecture,
    servers: ServerHardware,
    *,
    problems: int,
    traces: int,
    prompt_tokens: float,
    answers: LengthDistribution,
) -> ServingTime:
    """Return the seconds to sample `traces` traces for each of `problems`.

    A problem's prompt is read once; by gated delta nets once for each trace, as SGLang keeps no states of it.
    """
    return serving_time(
        architecture,
        servers,
        requests=problems * traces,
        prompt_tokens=prompt_tokens,
        read_tokens=(problems if architecture.delta_net is None else problems * traces) * prompt_tokens,
        answers=answers,
    )


def judging_time(
    architecture: Architecture,
    servers: ServerHardware,
    *,
    problems: int,
    judgements: int,
    shared_tokens: float,
    own_tokens: float,
    answers: LengthDistribution,
    cached: bool = True,
) -> ServingTime:
    """Return the seconds for `judgements` judgements of each of `problems`.

    Their prompts share `shared_tokens` (system, problem, rubric) and have `own_tokens` of a trace each; `cached`:
    the shared part is read once for each problem, else (and by gated delta nets) with every judgement.

    More than 7 parameters: they are the variables of the formula.
    """
    requests = problems * judgements
    return serving_time(
        architecture,
        servers,
        requests=requests,
        prompt_tokens=shared_tokens + own_tokens,
        read_tokens=(problems if cached and architecture.delta_net is None else requests) * shared_tokens
        + requests * own_tokens,
        answers=answers,
    )


def judging_tail(sampling: ServingTime, judging: ServingTime, own_devices: bool) -> float:
    """Return the seconds of judging after the last trace is there.

    On devices of its own a judge works while traces still come: what is left is its surplus over sampling, and at
    least one round of the servers. On the sampling devices it starts when they are free.
    """
    if not own_devices:
        return judging.total_s
    rounds = max(1.0, judging.requests / judging.concurrent)
    return max(judging.total_s - sampling.total_s, judging.total_s / rounds)


def host_swap_time(size_bytes: float, gpu: Gpu) -> float:
    """Return the seconds to exchange `size_bytes` of a GPU's weights with host memory: out and in at the same time."""
    return size_bytes / (gpu.host_bytes_per_s * NVLINK_EFFICIENCY)


def save_time(size_bytes: float, storage_bytes_per_s: float) -> float:
    """Return the seconds to write a checkpoint of `size_bytes` in all."""
    return size_bytes / storage_bytes_per_s
