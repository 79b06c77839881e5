"""A run before it is submitted: memory and seconds of every phase, what does not fit, and better layouts."""

from dataclasses import dataclass, field

from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.config.stages import Stage
from exprl_megatron.errors import UserError
from exprl_megatron.planning.hardware import GIB, Gpu
from exprl_megatron.planning.layouts import Learning, learning, rank_layouts
from exprl_megatron.planning.memory import (
    USABLE,
    Memory,
    host_memory,
    log_prob_memory,
    reshard_memory,
    resident_memory,
    server_memory,
)
from exprl_megatron.planning.parameters import model_parameters, rank_counts
from exprl_megatron.planning.rl_time import (
    RAGGED,
    host_swap_time,
    judging_tail,
    judging_time,
    reshard_time,
    sampling_time,
    save_time,
)
from exprl_megatron.planning.serving_time import Lengths, Servers, ServingTime, prefill_seconds
from exprl_megatron.planning.targets import find_architecture
from exprl_megatron.planning.workload import Workload
from exprl_megatron.policy.architecture import Architecture, layout_violations
from exprl_megatron.policy.precision_matrix import BLACKWELL, HOPPER, Setting, precision_violations

STORAGE_BYTES_PER_S = 2e9
"""At which each trainer node writes its part of a checkpoint (assumed)."""


@dataclass(frozen=True)
class Phase:
    """One phase of a step on one kind of device."""

    name: str
    device: str
    """trainer, policy server, judge server or start server."""
    seconds: float
    """That it adds to a step."""
    memory: Memory
    """On the fullest such device."""
    tokens_per_s_per_gpu: float | None = None
    mfu: float | None = None
    peak: str | None = None
    """The peak that `mfu` is a share of."""


@dataclass(frozen=True)
class Plan:
    """All that `exprl plan` prints."""

    model: str
    gpu: Gpu
    gpus: dict[str, int]
    """GPUs by device kind."""
    workload: Workload
    learning: Learning
    phases: list[Phase]
    starting_policy: dict[str, float] = field(default_factory=dict)
    """What either choice of `policy.starting_policy` costs; empty where no stage needs it."""
    faults: list[str] = field(default_factory=list)
    """One sentence for everything that does not fit or cannot be built."""
    notes: list[str] = field(default_factory=list)
    """What was assumed."""
    ranking: list[Learning] = field(default_factory=list)

    @property
    def step_s(self) -> float:
        """Seconds of a step: phases in turn, as the loop runs them."""
        return sum(phase.seconds for phase in self.phases)


def plan(config: RunConfig, stage: Stage, workload: Workload, gpu: Gpu) -> Plan:
    """The step of `stage` as the config lays it out. Raises UserError where a model is not to be found."""
    architecture, known = find_architecture(config.policy.model)
    notes = [_assumed_architecture(config.policy.model, known)] if known else []
    faults = _illegal(config, stage, architecture, workload, gpu)
    if layout_violations(architecture, config.policy.layout) or not _runs(config, gpu):
        raise UserError("\n".join(faults))
    one = learning(architecture, config.policy, stage.optimizer, workload, gpu)
    gpus = {"trainer": config.policy.layout.world_size}
    phases = []
    if workload.sampled:
        gpus["policy server"] = config.server.count * config.server.tp
        phases += _serving(config, architecture, workload, gpu, gpus, faults, notes)
    start = _starting_policy(config, stage, architecture, workload, gpu, one) if workload.keeps_start else {}
    if start and config.policy.starting_policy == "server":
        phases += _start_server(config, architecture, gpu, gpus, start, faults)
    phases += _trainer(config, stage, architecture, workload, gpu, one)
    faults += [
        _too_much(phase, gpu, one) for phase in phases if phase.device == "trainer" and phase.memory.over(gpu) > 0
    ]
    return Plan(config.policy.model, gpu, gpus, workload, one, phases, start, faults, notes)


def ranked(config: RunConfig, stage: Stage, workload: Workload, gpu: Gpu, gpus: int, top: int) -> list[Learning]:
    """The best layouts of `gpus` trainer GPUs for the config's policy."""
    architecture, _ = find_architecture(config.policy.model)
    return rank_layouts(architecture, config.policy, stage.optimizer, workload, gpu, gpus)[:top]


def sampling_seconds(architecture: Architecture, servers: Servers, workload: Workload) -> ServingTime:
    """All of a step's traces."""
    return sampling_time(
        architecture,
        servers,
        problems=workload.problems,
        traces=workload.traces,
        prompt_tokens=workload.prompt_tokens,
        answers=Lengths(workload.response_tokens, workload.bound),
    )


def servers_of(architecture: Architecture, server: ServerConfig, gpu: Gpu) -> Servers:
    """The config's servers as the time model takes them. Raises UserError where the weights do not fit."""
    memory = server_memory(architecture, server, gpu)
    return Servers(server.count, server.tp, gpu, memory_share=(memory.weights + memory.kv_cache) / gpu.memory_bytes)


def _serving(config, architecture, workload, gpu, gpus, faults, notes) -> list[Phase]:
    """Sampling, and judging where there is a judge with servers of its own."""
    try:
        memory = server_memory(architecture, config.server, gpu, config.sync.bucket_mb * 2**20)
        sampling = sampling_seconds(architecture, servers_of(architecture, config.server, gpu), workload)
    except UserError as error:
        faults.append(f"sample: {error}")
        return []
    traces = workload.problems * workload.traces
    rate = traces * workload.response_tokens / sampling.total_s / gpus["policy server"]
    phases = [Phase("sample", "policy server", sampling.total_s, memory, rate)]
    if not workload.judgements:
        return phases
    if config.judge.endpoints:
        notes.append("judge.endpoints judge: their time is not predicted.")
        return phases
    judge, known = find_architecture(config.judge.model)
    if known:
        notes.append(_assumed_architecture(config.judge.model, known))
    server = config.judge.server
    gpus["judge server"] = server.count * server.tp
    try:
        held = server_memory(judge, server, gpu)
        judging = judging_time(
            judge,
            servers_of(judge, server, gpu),
            problems=workload.problems,
            judgements=workload.traces * workload.judgements,
            shared_tokens=workload.reference_tokens,
            own_tokens=workload.response_tokens / workload.judgements,
            answers=Lengths(workload.verdict_tokens, workload.verdict_bound),
        )
    except UserError as error:
        faults.append(f"judge: {error}")
        return phases
    verdicts = traces * workload.judgements * workload.verdict_tokens
    tail = judging_tail(sampling, judging, own_devices=True)
    return [*phases, Phase("judge", "judge server", tail, held, verdicts / judging.total_s / gpus["judge server"])]


def _start_server(config, architecture, gpu, gpus, start, faults) -> list[Phase]:
    """One more server like the policy's, with the stage's starting weights."""
    gpus["start server"] = config.server.tp
    try:
        memory = server_memory(architecture, config.server, gpu)
    except UserError as error:
        faults.append(f"score start: {error}")
        return []
    return [Phase("score start", "start server", start["server_score_s"], memory)]


def _trainer(config, stage, architecture, workload, gpu, one: Learning) -> list[Phase]:
    policy, optimizer = config.policy, stage.optimizer
    phases = []
    if one.log_probs is not None:
        memory = _fullest(policy.layout.pp, lambda rank: log_prob_memory(architecture, policy, optimizer, rank, gpu))
        seconds = RAGGED * one.passes * one.log_probs.total_s
        if workload.keeps_start and policy.starting_policy == "host":
            seconds += _swap_seconds(architecture, config, gpu, one)
        phases.append(Phase("log-probs", "trainer", seconds, memory, *_efficiency(one.log_probs)))
    ragged = RAGGED if workload.sampled else 1.0
    phases.append(
        Phase("train", "trainer", ragged * one.updates * one.training.total_s, one.memory, *_efficiency(one.training))
    )
    if workload.sampled:
        bucket = config.sync.bucket_mb * 2**20
        memory = _fullest(
            policy.layout.pp, lambda rank: reshard_memory(architecture, policy, optimizer, rank, bucket, gpu)
        )
        phases.append(
            Phase("reshard", "trainer", reshard_time(architecture, policy.layout, gpu, colocated=False), memory)
        )
    memory = _fullest(policy.layout.pp, lambda rank: resident_memory(architecture, policy, optimizer, rank, gpu))
    state = model_parameters(architecture) * (12 if policy.precision.dtype == "fp32" else 14)
    nodes = max(1, policy.layout.world_size // gpu.gpus_per_node)
    seconds = save_time(state, nodes * STORAGE_BYTES_PER_S) / config.checkpoint.every_steps
    return [*phases, Phase("save", "trainer", seconds, memory)]


def _starting_policy(config, stage, architecture, workload, gpu, one) -> dict[str, float]:
    """Both places of the frozen starting weights: host memory of a rank, or the GPUs of a server."""
    policy, layout = config.policy, config.policy.layout
    host = policy.model_copy(update={"starting_policy": "host"})
    kept = max(
        host_memory(architecture, host, stage.optimizer, rank, True).starting_policy for rank in range(layout.pp)
    )
    wide = 4 if policy.precision.dtype == "fp32" else 2
    one_server = Servers(1, config.server.tp, gpu)
    return {
        "host_bytes_per_rank": kept,
        "host_swap_s": _swap_seconds(architecture, config, gpu, one),
        "server_weight_bytes_per_gpu": model_parameters(architecture) * wide / config.server.tp,
        "server_score_s": prefill_seconds(architecture, one_server, workload.tokens, workload.sequence_length),
    }


def _swap_seconds(architecture, config, gpu, one) -> float:
    """Out with the current weights and in with the starting ones, and back."""
    counts = (rank_counts(architecture, one.layout, rank).total for rank in range(one.layout.pp))
    size = max(counts) * (4 if config.policy.precision.dtype == "fp32" else 2)
    return 2 * host_swap_time(size, gpu)


def _efficiency(time) -> tuple[float, float, str]:
    return time.tokens_per_s_per_gpu, time.mfu, time.peak_name


def _fullest(pp: int, memory_of) -> Memory:
    return max((memory_of(rank) for rank in range(pp)), key=lambda memory: memory.total)


def _illegal(config, stage, architecture, workload, gpu) -> list[str]:
    setting = Setting(
        policy=config.policy,
        capability=BLACKWELL if gpu.blackwell else HOPPER,
        optimizers=(stage.optimizer,),
        architecture=architecture,
        starting_weights=workload.keeps_start,
    )
    return layout_violations(architecture, config.policy.layout) + (
        precision_violations(setting) if gpu.fp8_kinds else []
    )


def _runs(config, gpu) -> bool:
    """Whether the time model has a peak for the precision."""
    return not config.policy.precision.fp8 or config.policy.precision.kind in gpu.fp8_kinds


def _assumed_architecture(model: str, known: str) -> str:
    return f"{model} is not here: its shape is taken to be that of {known}."


def _too_much(phase: Phase, gpu: Gpu, one: Learning) -> str:
    over = phase.memory.over(gpu) / GIB
    return (
        f"{phase.name}: a trainer rank needs {over:.1f} GiB more than the {gpu.memory_bytes * USABLE / GIB:.1f} GiB "
        f"that may be filled of a {gpu.name}; {_remedy(phase, one)}."
    )


def _remedy(phase: Phase, one: Learning) -> str:
    memory = phase.memory
    if memory.activations > memory.optimizer and one.policy.recompute != "full":
        return "set policy.recompute to full, lower policy.micro_batch_tokens, or raise policy.layout.cp"
    if memory.optimizer > memory.weights + memory.gradients:
        return "raise policy.layout.dp, or set optimizer.offload"
    return "raise policy.layout.tp or pp"
