"""An HTTP and JSON client of one server: session, deadlines, and typed errors.

aiohttp does the HTTP. Written here: replies of limited size, refusal of repeated JSON fields, and errors that name the
server and quote its log.
"""

import json
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import aiohttp
import msgspec

from exprl_megatron.errors import KeyRefused, RequestRefused, ServerError
from exprl_megatron.processes.log_tail import log_tail

CONNECT_S = 30.0
"""Seconds within which a server must accept a connection."""
REPLY_LIMIT = 16 * 2**20
"""Default for the maximum bytes of a reply."""
_JSON = {"Content-Type": "application/json"}
_UNCOMPRESSED = {"Accept-Encoding": "identity"}
_REFUSALS = (400, 413, 422)
_NO_KEY = 401
_OPEN_FILES = 65_536
_SHOWN = 300
"""Characters of a reply that an error message quotes."""


class _RepeatedField(Exception):
    """A JSON object has a field twice, so its value is ambiguous."""


class HttpClient:
    """Client of one server; use as `async with client:` within one event loop at a time.

    Every call raises ServerError where the server is dead, exceeds the deadline, or refuses; RequestRefused, a
    subclass, where the server rejects this request (HTTP 400, 413, 422), and KeyRefused where it rejects the key (401).
    """

    def __init__(
        self,
        url: str,
        name: str,
        log_file: Path | None = None,
        deadline_s: float = 600.0,
        headers: Mapping[str, str] | None = None,
    ):
        self.url = url.rstrip("/")
        self.name = name
        self.log_file = log_file
        self.deadline_s = deadline_s
        self.headers = dict(headers or {})
        self._session: aiohttp.ClientSession | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        _allow_many_connections()
        # SGLang closes a connection after 5 idle seconds; reusing it at that moment would look like a dead server.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0)
        # A compressed reply could have any size after decompression.
        self._session = aiohttp.ClientSession(connector=connector, auto_decompress=False)
        return self

    async def __aexit__(self, *exception: object) -> None:
        session, self._session = self._session, None
        self._closed = True
        if session is not None:
            await session.close()

    async def _post(
        self, path: str, request: dict | None, deadline_s: float | None = None, limit: int = REPLY_LIMIT
    ) -> Any:
        return await self._request("POST", path, request, deadline_s, limit)

    async def _request(
        self, method: str, path: str, body: dict | None, deadline_s: float | None, limit: int = REPLY_LIMIT
    ) -> Any:
        """Return the decoded JSON (or text) of the reply; every failure becomes a ServerError."""
        reply = await self._exchange(method, path, body, deadline_s, limit)
        try:
            return json.loads(reply, object_pairs_hook=_without_repeats)
        except _RepeatedField as error:
            raise self._error(path, f"answered with the field {error} more than once") from error
        except RecursionError as error:
            raise self._error(path, "answered JSON that is nested too deeply") from error
        except ValueError:
            return reply.decode(errors="replace")

    async def _exchange(
        self, method: str, path: str, body: dict | None, deadline_s: float | None, limit: int = REPLY_LIMIT
    ) -> bytes:
        """Return the body of the reply, of at most `limit` bytes; every failure becomes a ServerError."""
        if self._session is None:
            if self._closed:
                # A pool closes it where the server registers again, even while it is in use.
                raise self._error(path, "its client was closed before the request")
            raise RuntimeError(f"the client of {self.name} is not open; use `async with client:`")
        deadline_s = self.deadline_s if deadline_s is None else deadline_s
        timeout = aiohttp.ClientTimeout(total=deadline_s, sock_connect=CONNECT_S)
        try:
            headers = self.headers | _UNCOMPRESSED | ({} if body is None else _JSON)
            data = None if body is None else _json(body)
            # The request has a reference, and is for this server alone: redirects are not followed.
            asked = self._session.request(
                method, self.url + path, data=data, headers=headers, timeout=timeout, allow_redirects=False
            )
            async with asked as response:
                reply = await self._body(path, response, limit)
                status = response.status
        except TimeoutError as error:
            raise self._error(path, f"no answer within {deadline_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise self._error(path, f"died or is not reachable ({type(error).__name__}: {error})") from error
        if status not in (200, 202):
            said = self._without_key(_message(reply.decode(errors="replace")))
            if 300 <= status < 400:
                said = f"it redirects to another address; name that one. {said}".strip()
            refused = self._error(path, f"refused with HTTP {status}: {said}")
            if status == _NO_KEY:
                raise KeyRefused(str(refused))
            raise RequestRefused(str(refused), said) if status in _REFUSALS else refused
        return reply

    async def _body(self, path: str, response: aiohttp.ClientResponse, limit: int) -> bytes:
        """Read the body; stops at `limit` bytes and closes the connection."""
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding.lower() != "identity":
            raise self._error(path, f"answered in Content-Encoding {encoding[:40]}, which was not requested")
        pieces, size = [], 0
        async for piece in response.content.iter_any():
            size += len(piece)
            if size > limit:
                raise self._error(path, f"answered with more than {limit} bytes, the limit for this request")
            pieces.append(piece)
        return b"".join(pieces)

    def _read(self, path: str, parse: Any, reply: Any) -> Any:
        try:
            return parse(reply)
        except (AttributeError, KeyError, TypeError, ValueError, IndexError, OverflowError, RecursionError) as error:
            said = reply[:_SHOWN].decode(errors="replace") if isinstance(reply, bytes) else str(reply)
            raise self._error(path, f"answered in an unknown form ({error!r}): {said[:_SHOWN]}") from error

    def _error(self, path: str, what: str) -> ServerError:
        what = self._without_key(what.rstrip("."))
        return ServerError(f"{self.name} ({self.url}), asked {path}: {what}.{log_tail(self.log_file)}")

    def _without_key(self, text: str) -> str:
        """Return `text`, which a server may have made of the request's headers, without the key in them."""
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return text.replace(key, "[key]") if key else text


def _json(body: dict) -> bytes:
    """Encode with msgspec, which is fast for many token ids; text with lone surrogates with Python's own module."""
    try:
        return msgspec.json.encode(body)
    except UnicodeEncodeError:
        return json.dumps(body).encode()


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedField(next(name for name in names if names.count(name) > 1)[:_SHOWN])
    return found


def _message(text: str) -> str:
    """Return the error message in the body of a reply."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return text.strip()[:2000]
    if isinstance(body, dict):
        inner = body.get("error", body)
        if isinstance(inner, dict) and "message" in inner:
            return str(inner["message"])[:2000]
    return text.strip()[:2000]


def _allow_many_connections() -> None:
    """Raise the limit of open files: all requests of a step are in flight together, each with its own socket."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
