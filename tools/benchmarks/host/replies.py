"""From the bytes of the servers' replies to arrays, as they come in."""

from collections.abc import Callable

import msgspec

from benchmarks.host.station import Station
from benchmarks.host.workload import Workload
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.serving.generation import read_generation

_DISTINCT_TOKENS = 4_000_000
"""Of replies that are prepared; they are read over again, so that the largest step does not fill the memory."""


def prepare(workload: Workload) -> Callable[[], object]:
    """Reads a reply for each trace and keeps what it says."""
    traces = [member.trace for group in workload.groups for member in group.samples]
    count = max(1, min(len(traces), _DISTINCT_TOKENS // workload.mean_tokens))
    bodies = [body(trace) for trace in traces[:count]]
    return lambda: [read_generation(bodies[i % count]) for i in range(len(traces))]


def body(trace: Trace, experts: bytes | None = None) -> bytes:
    """The reply of /generate that gives `trace`, as SGLang writes it, with these routed experts."""
    token_ids, log_probs = trace.token_ids.tolist(), trace.log_probs.tolist()
    meta: dict[str, object] = {
        "id": "0" * 32,
        "finish_reason": {"type": "stop", "matched": 2},
        "prompt_tokens": len(trace.prompt_ids),
        "weight_version": "v3",
        "output_token_logprobs": [[one, token, None] for one, token in zip(log_probs, token_ids, strict=True)],
        "completion_tokens": len(token_ids),
        "cached_tokens": trace.cached_tokens,
        "weight_versions": [{"version": "v3", "start": 0, "end": len(token_ids)}],
    }
    if experts is not None:
        # msgspec writes bytes in base64.
        meta["routed_experts"] = experts
    return msgspec.json.encode({"text": trace.text, "output_ids": token_ids, "meta_info": meta})


STATION = Station("replies to arrays", blocks=False, prepare=prepare)
