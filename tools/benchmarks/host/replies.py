"""From the bytes of the servers' replies to arrays, as they come in."""

import base64
from collections.abc import Callable

import msgspec

from benchmarks.host.station import Station
from benchmarks.host.workload import Workload
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.serving.flat_log_probs import IDS, LOG_PROBS
from exprl_megatron.serving.generation import read_generation

_DISTINCT_TOKENS = 4_000_000
"""Of replies that are prepared; they are read over again, so that the largest step does not fill the memory."""


def prepare(workload: Workload) -> Callable[[], object]:
    """Reads a reply for each trace, as a server with our plugins writes it, and keeps what it says."""
    return reading(workload, flat=True)


def reading(workload: Workload, flat: bool) -> Callable[[], object]:
    """The work of a step's replies; `flat`: with log-probs as arrays in base64, otherwise as SGLang's lists."""
    traces = [member.trace for group in workload.groups for member in group.samples]
    count = max(1, min(len(traces), _DISTINCT_TOKENS // workload.mean_tokens))
    bodies = [body(trace, flat=flat) for trace in traces[:count]]
    return lambda: [read_generation(bodies[i % count]) for i in range(len(traces))]


def body(trace: Trace, experts: bytes | None = None, flat: bool = True) -> bytes:
    """The reply of /generate that gives `trace`, with these routed experts.

    With `flat` log-probs it is as a server with our plugins writes it, otherwise as SGLang itself does.
    """
    token_ids, log_probs = trace.token_ids.tolist(), trace.log_probs.tolist()
    entries = [] if flat else [[one, token, None] for one, token in zip(log_probs, token_ids, strict=True)]
    meta: dict[str, object] = {
        "id": "0" * 32,
        "finish_reason": {"type": "stop", "matched": 2},
        "prompt_tokens": len(trace.prompt_ids),
        "weight_version": "v3",
        "output_token_logprobs": entries,
        "completion_tokens": len(token_ids),
        "cached_tokens": trace.cached_tokens,
        "weight_versions": [{"version": "v3", "start": 0, "end": len(token_ids)}],
    }
    if flat:
        meta[LOG_PROBS] = base64.b64encode(trace.log_probs.tobytes()).decode()
        meta[IDS] = base64.b64encode(trace.token_ids.tobytes()).decode()
    if experts is not None:
        # msgspec writes bytes in base64.
        meta["routed_experts"] = experts
    return msgspec.json.encode({"text": trace.text, "output_ids": [] if flat else token_ids, "meta_info": meta})


STATION = Station("replies to arrays", blocks=False, prepare=prepare)
