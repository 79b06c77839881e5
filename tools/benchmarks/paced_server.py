"""Replies of /generate that are prepared and come when they are due: a server without a model, for benchmarks.

    python -m benchmarks.paced_server BODIES [--over S [--replies N]] [--delay S]

BODIES is a JSON list of replies (JSON texts), given in turn. Reply i of N (default: as many as BODIES has) comes i / N
of `--over` seconds after the first request, or `--delay` seconds after its own. A request for no tokens is answered at
once, one for several continuations with as many replies. Prints its port.
"""

import argparse
import asyncio
import json
from pathlib import Path

_SEVERAL = b'"sampling_params":[{'
_NOTHING = json.dumps(
    {"text": "", "output_ids": [], "meta_info": {"finish_reason": {"type": "length"}, "weight_versions": []}}
).encode()


class PacedReplies:
    """When each reply is due."""

    def __init__(self, bodies: list[bytes], over_s: float | None, replies: int, delay_s: float):
        self._bodies, self._over_s, self._replies, self._delay_s = bodies, over_s, replies, delay_s
        self._given = 0
        self._first_at: float | None = None

    async def reply(self, request: bytes) -> bytes:
        """Return the next reply, when it is due."""
        if b'"max_new_tokens":0' in request:
            return _NOTHING
        several = request.count(b'"max_new_tokens"') if _SEVERAL in request else None
        now = asyncio.get_running_loop().time()
        self._first_at = now if self._first_at is None else self._first_at
        number, self._given = self._given, self._given + 1
        due = now + self._delay_s
        if self._over_s is not None:
            due = self._first_at + self._over_s * number / self._replies
        await asyncio.sleep(max(0.0, due - now))
        bodies = [self._bodies[(number + i) % len(self._bodies)] for i in range(several or 1)]
        return bodies[0] if several is None else b"[" + b",".join(bodies) + b"]"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                request = await reader.readexactly(int(lengths[0].split(b":")[1]) if lengths else 0)
                body = await self.reply(request)
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body))
                writer.write(body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()


async def _main(options: argparse.Namespace) -> None:
    bodies = [body.encode() for body in json.loads(options.bodies.read_text())]
    replies = PacedReplies(bodies, options.over, options.replies or len(bodies), options.delay)
    server = await asyncio.start_server(replies.serve, "127.0.0.1", 0, backlog=4096, limit=2**24)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("bodies", type=Path)
    parser.add_argument("--over", type=float)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--replies", type=int)
    asyncio.run(_main(parser.parse_args()))
