"""Attention of SGLang's servers on a CPU: our plugin's, of whole batches, against SGLang's loop over requests.

Both compute the same random batches in turns, in one process with one thread, on caches of random numbers: `decode` one
new token of each request, `extend` new tokens after cached ones (none, for a plain prompt). Processor milliseconds,
medians over rounds, the ratio of both, and the largest difference of the results.

    python tools/bench_cpu_decode.py [--rounds N] [--json F]
"""

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median


@dataclass(frozen=True)
class Shape:
    """Of a batch of requests; bounds are inclusive."""

    kind: str
    requests: int
    heads: int
    kv_heads: int
    width: int
    cached: tuple[int, int]
    new: tuple[int, int] = (1, 1)

    def __str__(self) -> str:
        heads = f"{self.heads}/{self.kv_heads} heads of {self.width}"
        return f"{self.kind} {self.requests} requests, {heads}, {self.cached} cached, {self.new} new"


MINIATURE, SMOLLM = (4, 2, 32), (9, 3, 64)
SHAPES = (
    Shape("decode", 256, *MINIATURE, (20, 85)),
    Shape("decode", 256, *SMOLLM, (200, 600)),
    Shape("decode", 16, *SMOLLM, (200, 600)),
    Shape("decode", 32, *SMOLLM, (16, 2000)),
    Shape("extend", 16, *MINIATURE, (0, 0), (20, 60)),
    Shape("extend", 16, *SMOLLM, (0, 0), (100, 300)),
    Shape("extend", 64, *MINIATURE, (40, 100), (5, 60)),
    Shape("extend", 8, *SMOLLM, (400, 800), (20, 100)),
)
_PLACES, _CONTEXT, _LAYERS = 100_000, 4096, 4
_STARTED = "EXPRL_BENCH_AS_A_SERVER"
PLANS = "exprl_decode_plans"
"""As in exprl_cpu_attention, which only servers can import."""


@dataclass(frozen=True)
class Row:
    """One shape, measured."""

    shape: str
    sglang_ms: float
    ours_ms: float
    ratio: float
    difference: float
    """The largest, of results of about 1."""
    plans: int
    """How often our way has planned its work, of those that all layers of a pass share."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if _STARTED not in os.environ:
        _as_a_server()
    from sglang.srt.plugins import load_plugins

    load_plugins()
    rows = [measured(shape, args.rounds) for shape in SHAPES]
    for row in rows:
        print(f"{row.shape:<70} {row.sglang_ms:9.2f} {row.ours_ms:9.2f} ms  {row.ratio:5.2f} x  {row.difference:.1e}")
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


def measured(shape: Shape, rounds: int) -> Row:
    """Measure both ways in turns."""
    backend, *ways = _ways(shape)
    results = [way() for way in ways]
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds):
        for way, spent in zip(ways, seconds, strict=True):
            began = time.process_time()
            way()
            spent.append(time.process_time() - began)
    sglang, ours = (1e3 * median(spent) for spent in seconds)
    difference = (results[0] - results[1]).abs().max().item()
    return Row(str(shape), sglang, ours, sglang / ours, difference, len(getattr(backend, PLANS)))


def _ways(shape: Shape):
    """SGLang's backend; its own method and the one that servers have, each on the same batch with its own output."""
    import torch
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)

    def lengths(bounds: tuple[int, int]):
        return torch.randint(bounds[0], bounds[1] + 1, (shape.requests,), generator=generator)

    cached, new = lengths(shape.cached), lengths(shape.new)
    keys, values = (torch.randn(_PLACES, shape.kv_heads, shape.width, generator=generator) for _ in range(2))
    pools = torch.randperm(shape.requests + 8, generator=generator)[: shape.requests]
    table = torch.randint(0, _PLACES, (shape.requests + 8, _CONTEXT), generator=generator, dtype=torch.int32)
    query = torch.randn(int(new.sum()), shape.heads, shape.width, generator=generator)
    counts = (cached, new) if shape.kind == "extend" else ()
    method = getattr(TorchNativeAttnBackend, f"_run_sdpa_forward_{shape.kind}")
    settings = {
        "scaling": shape.width**-0.5,
        "enable_gqa": shape.heads != shape.kv_heads,
        "causal": shape.kind == "extend",
        "is_cross_attn": False,
        "sliding_window_size": None,
    }
    backend = object.__new__(TorchNativeAttnBackend)
    backend.use_sliding_window_kv_pool = False

    def way(call):
        output = torch.empty_like(query)
        tensors = (query, output, keys, values, table, pools, cached + new, *counts, None)

        def forward_pass():
            backend.init_forward_metadata(None)
            for _ in range(_LAYERS):
                call(backend, *tensors, **settings)
            return output.clone()

        return forward_pass

    return backend, way(method.__wrapped__), way(method)


def _as_a_server() -> None:
    """Begin again with the environment of a server on a CPU, and its plugin."""
    from exprl_megatron.serving.server_command import server_environment

    environment = server_environment(os.environ, cuda=False) | {_STARTED: "1"}
    os.execve(sys.executable, [sys.executable, "-W", "ignore", *sys.argv], environment)


if __name__ == "__main__":
    main()
