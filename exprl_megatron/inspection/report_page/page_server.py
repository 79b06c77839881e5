"""Serves the page of running runs to this machine only, and refreshes it at each step; it is read-only.

A request needs the token that is in the printed address, and has to name this machine as the host: a page of another
site whose name was made to mean this machine (DNS rebinding) does not.
"""

import asyncio
import hmac
import os
import secrets
from collections.abc import Awaitable, Callable

from aiohttp import web

from exprl_megatron.errors import UserError
from exprl_megatron.inspection.report_page.page_file import MOST_BYTES, block_bytes, render
from exprl_megatron.inspection.report_page.page_json import embedded
from exprl_megatron.inspection.report_page.page_model import PageModel, PageReader

_HOST = "127.0.0.1"
_NAMES = (_HOST, "localhost")
_HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class PageServer:
    """Answers GET /, /stamp, /model and /block/KEY of one reader's runs."""

    def __init__(self, reader: PageReader, token: str):
        self._reader = reader
        self._token = token
        self._stamp: tuple | None = None
        self._model: PageModel | None = None
        self._reading = asyncio.Lock()

    def application(self) -> web.Application:
        """Return the application, which checks every request, whatever it asks for."""
        application = web.Application(middlewares=[self._checked])
        application.add_routes(
            [
                web.get("/", self._page),
                web.get("/stamp", self._say_stamp),
                web.get("/model", self._say_model),
                web.get(r"/block/{key:[0-9a-f]{16}}", self._say_block),
            ]
        )
        return application

    @web.middleware
    async def _checked(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        name, _, port = request.headers.get("Host", "").rpartition(":")
        if name not in _NAMES or request.transport is None or port != str(request.get_extra_info("sockname")[1]):
            raise web.HTTPForbidden(text="This page is served to its own machine alone.", headers=_HEADERS)
        if not hmac.compare_digest(request.query.get("token", "").encode(), self._token.encode()):
            raise web.HTTPForbidden(text="Open the address that exprl report has printed.", headers=_HEADERS)
        answer = await handler(request)
        answer.headers.update(_HEADERS)
        return answer

    async def _newest(self) -> PageModel:
        """Return what the runs have written so far; read it again only where that is more than the last time."""
        async with self._reading:
            stamp = await asyncio.to_thread(self._reader.stamp)
            if self._model is None or stamp != self._stamp:
                self._model = await asyncio.to_thread(self._reader.model, MOST_BYTES)
                self._stamp = stamp
            return self._model

    async def _page(self, _: web.Request) -> web.Response:
        page = await asyncio.to_thread(render, await self._newest(), True)
        return web.Response(body=page, content_type="text/html", charset="utf-8")

    async def _say_stamp(self, _: web.Request) -> web.Response:
        """Return a text that differs where there is something new."""
        return web.Response(text=str(hash(await asyncio.to_thread(self._reader.stamp))))

    async def _say_model(self, _: web.Request) -> web.Response:
        return web.Response(text=embedded((await self._newest()).tree), content_type="application/json")

    async def _say_block(self, request: web.Request) -> web.Response:
        block = None if self._model is None else self._model.blocks.get(request.match_info["key"])
        if block is None:
            raise web.HTTPNotFound(headers=_HEADERS)
        # Not as an encoding of the transfer: the page's program unpacks it, as it does in a file.
        return web.Response(body=block_bytes(block), content_type="application/gzip")


def serve_page(reader: PageReader, port: int) -> None:
    """Serve until interrupted, and print the address.

    Raises:
        UserError: the port is taken.
    """
    try:
        asyncio.run(_serve(reader, port))
    except OSError as error:
        raise UserError(
            f"The page cannot be served on port {port} ({os.strerror(error.errno or 0)}); choose another --port."
        ) from error


async def _serve(reader: PageReader, port: int) -> None:
    token = secrets.token_urlsafe(32)
    runner = web.AppRunner(PageServer(reader, token).application(), access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, _HOST, port)
        await site.start()
        port = runner.addresses[0][1]
        print(f"http://{_HOST}:{port}/?token={token}  (Ctrl-C ends it)", flush=True)
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
