"""Requests of somebody who can reach a run's servers and has no key."""

import asyncio
import os
from collections.abc import Mapping

import aiohttp

SERVER: Mapping[str, dict | None] = {
    "/generate": {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 4}},
    "/configure_logging": {"log_requests": True, "dump_requests_folder": "stolen", "dump_requests_threshold": 1},
    "/begin_weight_update": {},
    "/update_weights_from_tensor": {"serialized_named_tensors": ["gASVAA=="], "load_format": None},
    "/update_weights_from_distributed": {"names": [], "dtypes": [], "shapes": [], "group_name": "stolen"},
    "/init_weights_update_group": {"master_address": "127.0.0.1", "master_port": 9, "rank_offset": 1, "world_size": 2},
    "/update_weights_from_disk": {"model_path": "/nonexistent", "weight_version": "v1"},
    "/update_weight_version": {"new_version": "v1"},
    "/pause_generation": {"mode": "abort"},
    "/continue_generation": {},
    "/abort_request": {"abort_all": True},
    "/flush_cache": {},
    "/start_profile": {"output_dir": "stolen"},
    "/set_internal_state": {"server_args": {}},
    "/weights_checker": {"action": "checksum"},
    "/release_memory_occupation": {},
    "/resume_memory_occupation": {},
    "/server_info": None,
    "/model_info": None,
}
"""By path what is asked, GET where nothing is posted."""
ROUTER: Mapping[str, dict | None] = {
    "/generate": {"text": "1 + 1 =", "sampling_params": {"max_new_tokens": 4}},
    "/v1/chat/completions": {"model": "m", "messages": [{"role": "user", "content": "1 + 1 ="}]},
    "/workers": {"url": "http://127.0.0.1:9"},
    "/flush_cache": {},
}
_HEADERS: tuple[Mapping[str, str], ...] = (
    {},
    {"Authorization": "Bearer wrong"},
    {"Authorization": "Bearer "},
    {"Authorization": "Basic cm9vdDpyb290"},
)
_DEADLINE_S = 120.0


async def let_in(url: str, routes: Mapping[str, dict | None]) -> list[str]:
    """Return all of `routes`, with no key and with wrong ones, side by side; those that were not refused as
    unauthorized.

    Bytes that are not HTTP are sent as well; any answer to them is accepted, or none.
    """
    timeout = aiohttp.ClientTimeout(total=_DEADLINE_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:

        async def status(path: str, headers: Mapping[str, str]) -> str:
            body = routes[path]
            method = "GET" if body is None else "POST"
            async with session.request(method, url + path, json=body, headers=headers) as reply:
                return "" if reply.status == 401 else f"{method} {path}: HTTP {reply.status}"

        asked = [status(path, headers) for path in routes for headers in _HEADERS]
        found, _ = await asyncio.gather(asyncio.gather(*asked), _send_bytes(url))
    return [answer for answer in found if answer]


async def _send_bytes(url: str) -> None:
    host, _, port = url.removeprefix("http://").rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(os.urandom(4096) + b"\r\n\r\n")
    writer.close()
