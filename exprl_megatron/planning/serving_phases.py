"""The phases of a step that run on servers: sampling, judging, and scoring the reference policy."""

from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.errors import UserError
from exprl_megatron.models.architecture import Architecture
from exprl_megatron.models.flops import model_flops
from exprl_megatron.planning.hardware import Gpu
from exprl_megatron.planning.memory import server_memory
from exprl_megatron.planning.phases import Phase, Speed, speed_of
from exprl_megatron.planning.rl_time import judging_tail, judging_time, sampling_time
from exprl_megatron.planning.serving_time import LengthDistribution, ServerHardware, ServingTime
from exprl_megatron.planning.targets import assumed_architecture, find_architecture
from exprl_megatron.planning.workload import Workload


def sampling_seconds(architecture: Architecture, servers: ServerHardware, workload: Workload) -> ServingTime:
    """Return the time to sample all traces of a step."""
    return sampling_time(
        architecture,
        servers,
        problems=workload.problems,
        traces=workload.traces,
        prompt_tokens=workload.prompt_tokens,
        answers=LengthDistribution(workload.response_tokens, workload.max_response_tokens),
    )


def judging_seconds(judge: Architecture, servers: ServerHardware, workload: Workload) -> ServingTime:
    """Return the time of all judgements of a step."""
    return judging_time(
        judge,
        servers,
        problems=workload.problems,
        judgements=workload.traces * workload.judgements,
        shared_tokens=workload.reference_tokens,
        own_tokens=workload.response_tokens / workload.judgements,
        answers=LengthDistribution(workload.verdict_tokens, workload.max_verdict_tokens),
    )


def servers_of(architecture: Architecture, server: ServerConfig, gpu: Gpu) -> ServerHardware:
    """Return the config's servers as the time model takes them. Raises UserError where the weights do not fit."""
    memory = server_memory(architecture, server, gpu)
    return ServerHardware(
        server.count, server.tp, gpu, memory_share=(memory.weights + memory.kv_cache) / gpu.memory_bytes
    )


def serving_phases(
    config: RunConfig, architecture: Architecture, workload: Workload, gpu: Gpu, faults: list[str], notes: list[str]
) -> list[Phase]:
    """Return sampling, and judging by servers of the run; what does not fit is added to `faults`."""
    gpus = config.server.count * config.server.tp
    try:
        # Colocated servers open the trainer's bucket.
        bucket = config.sync.bucket_mb * 2**20 if config.placement.kind == "separate" else 0
        memory = server_memory(architecture, config.sampling_server, gpu, bucket)
        sampling = sampling_seconds(architecture, servers_of(architecture, config.sampling_server, gpu), workload)
    except UserError as error:
        faults.append(f"sample: {error}")
        return []
    traces = workload.problems * workload.traces
    speed = _speed(architecture, workload.sequence_length, traces * workload.response_tokens, sampling, gpus, gpu)
    phases = [Phase("sample", "policy server", sampling.total_s, memory, speed)]
    if not workload.judgements:
        return phases
    if config.required_judge.endpoints:
        notes.append("judge.endpoints judge: their time is not predicted.")
        return phases
    judge, known = find_architecture(config.required_judge.served_model)
    if known:
        notes.append(assumed_architecture(config.required_judge.served_model, known))
    own = config.required_judge.placement == "own"
    server = config.required_judge.server if own else config.sampling_server
    try:
        held = server_memory(judge, server, gpu)
        judging = judging_seconds(judge, servers_of(judge, server, gpu), workload)
    except UserError as error:
        faults.append(f"judge: {error}")
        return phases
    read = workload.reference_tokens / workload.traces + workload.response_tokens / workload.judgements
    tokens = traces * workload.judgements * (read + workload.verdict_tokens)
    speed = _speed(judge, workload.reference_tokens, tokens, judging, server.count * server.tp, gpu)
    tail = judging_tail(sampling, judging, own_devices=own)
    if not own:
        notes.append(
            "judge.placement is policy: the time in which the servers load the judge's weights is not predicted."
        )
    return [
        *phases,
        Phase("judge", "judge server" if own else "policy server", tail, held, speed, busy_s=judging.total_s),
    ]


def ref_server_phase(
    config: RunConfig, architecture: Architecture, workload: Workload, gpu: Gpu, seconds: float, faults: list[str]
) -> list[Phase]:
    """Return the phase of the reference policy's server, which scores the step's traces."""
    try:
        memory = server_memory(architecture, config.server, gpu)
    except UserError as error:
        faults.append(f"ref log-probs: {error}")
        return []
    flops = model_flops(architecture, workload.sequence_length, training=False) * workload.tokens
    speed = speed_of(workload.tokens, flops, seconds, config.server.tp, gpu.peak("bf16"))
    return [Phase("ref log-probs", "ref server", seconds, memory, speed)]


def _speed(architecture, length: float, tokens: float, time: ServingTime, gpus: int, gpu: Gpu) -> Speed:
    flops = model_flops(architecture, length, training=False) * tokens
    return speed_of(tokens, flops, time.total_s, gpus, gpu.peak("bf16"))
