"""A proxy in front of a server, which passes everything on until it is set to misbehave."""

import asyncio
import re
import threading
from collections.abc import Callable
from typing import Literal

from exprl_megatron.utils.ports import LOCAL, free_ports

Mode = Literal["pass", "hang", "refuse"]
"""`hang`: takes connections and never answers, open ones included. `refuse`: HTTP 500 to everything."""
_REFUSAL = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_CHUNK = 65_536
_LENGTH = re.compile(rb"(\r\ncontent-length: *)(\d+)(?=\r\n)", re.IGNORECASE)


class FaultProxy:
    """Listens at `url` for the server at `target`, which may change; runs in a thread of its own until `close`.

    `on_request` is called with the first line of each request that begins a chunk, before it is passed on, `on_reply`
    with that line and the body of the reply, in the proxy's thread; it returns the body that the client gets.
    """

    def __init__(self):
        (port,) = free_ports(1)
        self.url = f"http://{LOCAL}:{port}"
        self.target: tuple[str, int] | None = None
        self.on_request: Callable[[str], None] = lambda line: None
        self.on_reply: Callable[[str, bytes], bytes] = lambda line, body: body
        self._mode: Mode = "pass"
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._thread.start()
        self._run(asyncio.start_server(self._serve, LOCAL, port))

    @property
    def mode(self) -> Mode:
        """How it behaves now."""
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        self._mode = mode
        if mode != "hang":
            # Clients that hang are cut off; open connections would otherwise go on to the server.
            self._loop.call_soon_threadsafe(self._cut)

    def close(self) -> None:
        """Cut all connections and end."""
        self._loop.call_soon_threadsafe(self._cut)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self, coroutine) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _cut(self) -> None:
        for writer in list(self._open):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            if self._mode == "refuse":
                await reader.readuntil(b"\r\n\r\n")
                writer.write(_REFUSAL)
                await writer.drain()
                return
            await self._passed_on(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            return  # the server or its client is gone, as it must be expected of them here
        finally:
            self._open.discard(writer)
            writer.close()

    async def _passed_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.target is None:
            return
        back, forth = await asyncio.open_connection(*self.target)
        self._open.add(forth)
        asked = [""]

        def heard(chunk: bytes) -> None:
            line = chunk.partition(b"\r\n")[0]
            if line.endswith(b"HTTP/1.1"):
                asked[0] = line.decode(errors="replace")
                self.on_request(asked[0])

        try:
            ways = [self._pump(reader, forth, heard), self._pass_replies(back, writer, lambda: asked[0])]
            tasks = [asyncio.ensure_future(way) for way in ways]
            # Either side's end ends both.
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            self._open.discard(forth)
            forth.close()

    async def _pass_replies(
        self, source: asyncio.StreamReader, into: asyncio.StreamWriter, asked: Callable[[], str]
    ) -> None:
        """Replies of known length one by one through `on_reply`; from the first other one on, bytes as they come."""
        while True:
            head = await source.readuntil(b"\r\n\r\n")
            length = _LENGTH.search(head)
            if length is None:
                await self._send(into, head)
                await self._pump(source, into, lambda chunk: None)
                return
            body = self.on_reply(asked(), await source.readexactly(int(length[2])))
            await self._send(into, _LENGTH.sub(rb"\g<1>%d" % len(body), head, count=1) + body)

    async def _pump(
        self, source: asyncio.StreamReader, into: asyncio.StreamWriter, heard: Callable[[bytes], None]
    ) -> None:
        while chunk := await source.read(_CHUNK):
            heard(chunk)
            await self._send(into, chunk)

    async def _send(self, into: asyncio.StreamWriter, data: bytes) -> None:
        while self._mode == "hang":
            await asyncio.sleep(0.05)
        into.write(data)
        await into.drain()
