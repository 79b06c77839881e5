"""What routed experts cost rank 0: bytes of a reply and processor time to read it, for each response token.

Replies are those of a mixture of the shape of Qwen3-235B-A22B (94 layers, 8 of 128 experts): without experts, with
SGLang's int32, and with the bytes that a server with the plugin exprl_compact_experts sends; then what zlib would make
of these.

    python tools/bench_router_replay.py [--tokens 6000] [--repeats 5]
"""

import argparse
import base64
import time
import zlib
from collections.abc import Callable

import numpy as np
from benchmarks.host.replies import body
from benchmarks.host.workload import PROMPT_TOKENS, Workload

from exprl_megatron.models.routing import Routing
from exprl_megatron.serving.generation import ExpectedReply, read_generation

ROUTING = Routing(layers=94, top_k=8, experts=128)
SKEW = 0.8
"""Standard deviation of the experts' popularity, in nats: random choices would be the hardest to compress."""
COLUMNS = ("reply", "bytes a token", "CPU ns a token", "2,048 traces of 6,000 tokens: GB", "CPU s")


def chosen(rows: int, routing: Routing) -> np.ndarray:
    """[rows, layers, top_k], int32: the largest of scores in which some experts of a layer are favored."""
    draw = np.random.default_rng(0)
    favor = draw.normal(0, SKEW, (routing.layers, routing.experts)).astype(np.float32)
    scores = draw.standard_normal((rows, routing.layers, routing.experts), dtype=np.float32) + favor
    return scores.argpartition(-routing.top_k, axis=-1)[..., -routing.top_k :].astype(np.int32)


def replies(tokens: int) -> dict[str, tuple[bytes, Routing | None]]:
    """Return the reply of each kind, and what was asked for."""
    trace = max(
        (member.trace for member in Workload(16, tokens).groups[0].samples), key=lambda trace: len(trace.token_ids)
    )
    experts = chosen(PROMPT_TOKENS + len(trace.token_ids) - 1, ROUTING)
    compact = experts.astype(np.uint8).tobytes() + bytes([1])
    return {
        "without experts": (body(trace), None),
        "int32": (body(trace, experts.tobytes()), ROUTING),
        "uint8": (body(trace, compact), ROUTING),
    }


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Return processor seconds of one call, after a first one."""
    work()
    started = time.process_time()
    for _ in range(repeats):
        work()
    return (time.process_time() - started) / repeats


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=6000, help="mean length of the 16 traces, of which one is read")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(arguments)
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for name, (reply, routing) in replies(args.tokens).items():
        asked = ExpectedReply(routing=routing)
        tokens = len(read_generation(reply, asked).token_ids)
        cost = seconds(lambda reply=reply, asked=asked: read_generation(reply, asked), args.repeats)
        step = 2048 * 6000 / tokens
        print(
            f"| {name} | {len(reply) / tokens:,.0f} | {cost / tokens * 1e9:,.0f} | {len(reply) * step / 1e9:.1f} | "
            f"{cost * step:.0f} |"
        )
    ids = chosen(args.tokens, ROUTING).astype(np.uint8).tobytes()
    for level in (1, 6):
        packed = zlib.compress(ids, level)
        unpacking = seconds(lambda packed=packed: zlib.decompress(packed), args.repeats) / args.tokens
        packing = seconds(lambda level=level: zlib.compress(ids, level), 1) / args.tokens
        print(
            f"zlib level {level}: {len(base64.b64encode(packed)) / args.tokens:,.0f} bytes a token in base64, "
            f"{unpacking * 1e9:,.0f} ns a token to decompress, {packing * 1e9:,.0f} in the server to compress"
        )


if __name__ == "__main__":
    main()
