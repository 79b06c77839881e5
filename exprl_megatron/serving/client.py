"""Typed async client for the part of SGLang's HTTP API that training uses: weights, memory and state of a server."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from exprl_megatron.errors import RequestRefused, WeightsReplaced
from exprl_megatron.serving.generation_client import GenerationClient
from exprl_megatron.serving.http_client import REPLY_LIMIT
from exprl_megatron.serving.loader_commands import CommandNumbers, payload, signed
from exprl_megatron.serving.weight_layout import is_weight

_CHECKSUMS_LIMIT = 256 * 2**20
"""Bytes; some 150 for each tensor of each tensor-parallel rank."""
_command_numbers = CommandNumbers()


class ServedModel(msgspec.Struct, frozen=True):
    """The weights that a server says it serves."""

    weight_version: str
    model_path: str
    """Where it last loaded weights from a disk: at its start, or by `update_from_disk`."""


class SGLangClient(GenerationClient):
    """Client of one SGLang server; use as `async with client:` within one event loop at a time.

    Every call raises ServerError where the server is dead, exceeds the deadline, or refuses.
    """

    first_gpu = 0
    """Index of the server's first GPU on its machine; its other ranks have the next ones."""
    source: str | None = None
    """The `model_path` that the server has from our own requests; known after `reset`."""
    _start: int | None = None
    """Identifies this start of the server, after it has been requested: the seed, see `server_seed`."""
    _in_place = False
    """Whether paused requests keep their cache; SGLang then refuses to flush it, so weight updates do not flush it."""

    async def init_weights_group(
        self,
        *,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group: str,
        backend: Literal["gloo", "nccl"],
        deadline_s: float | None = None,
    ) -> None:
        """Join the broadcast group `group` with ranks from `rank_offset` on; the trainer is rank 0.

        Answers only when all `world_size` members met, so the trainer must join at the same time.
        """
        request = {
            "master_address": master_address,
            "master_port": master_port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": group,
            "backend": backend,
        }
        await self._command("/init_weights_update_group", request, deadline_s)

    async def destroy_weights_group(self, group: str, *, deadline_s: float | None = None) -> None:
        """Leave the broadcast group."""
        await self._command("/destroy_weights_update_group", {"group_name": group}, deadline_s)

    async def begin_weight_update(self, *, deadline_s: float | None = None) -> None:
        """Open a weight update; without it `update_from_distributed` is refused."""
        await self._command("/begin_weight_update", {}, deadline_s)

    async def update_from_distributed(
        self,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        *,
        group: str,
        version: str | None,
        flush_cache: bool,
        flattened: bool = False,
        deadline_s: float | None = None,
    ) -> None:
        """Receive one bucket: the trainer broadcasts these tensors, in this order, from rank 0.

        Names are Hugging Face's, dtypes as in `str(tensor.dtype)` without `torch.`. Give `version` and
        `flush_cache=True` with the last bucket. `flattened`: they come in one broadcast of their bytes, one behind the
        other without gaps; each must begin at a multiple of its numbers' size.

        More than 7 parameters: they are the fields of SGLang's request.
        """
        request = {
            "names": list(names),
            "dtypes": list(dtypes),
            "shapes": [list(shape) for shape in shapes],
            "group_name": group,
            "flush_cache": flush_cache and not self._in_place,
        }
        if version is not None:
            request["weight_version"] = version
        if flattened:
            request["load_format"] = "flattened_bucket"
        await self._command("/update_weights_from_distributed", request, deadline_s)

    async def update_from_tensor(
        self,
        payloads: Sequence[str] | Sequence[Mapping[str, Any]],
        *,
        version: str | None,
        flush_cache: bool,
        loader: str | None = None,
        deadline_s: float | None = None,
    ) -> None:
        """Load one bucket from memory that this machine shares.

        `payloads`, one for each tensor-parallel rank, are base64 of what `multiprocessing`'s pickler makes of a list of
        (Hugging Face name, tensor). Give `version` and `flush_cache=True` with the last bucket. `loader`: the function,
        one of the server's `--custom-weight-loader`, that is called with the list; the server dies where it is none.
        Then `payloads` are commands to it (see serving/loader.py), which are signed here with our key.
        """
        if loader is not None:
            if self._start is None:
                await self.loaders()
            number = _command_numbers.next()
            payloads = [payload(signed(command, self._key, self._start, number)) for command in payloads]
        request: dict[str, Any] = {"serialized_named_tensors": list(payloads)}
        request["flush_cache"] = flush_cache and not self._in_place
        if loader is not None:
            request["load_format"] = loader
        if version is not None:
            request["weight_version"] = version
        await self._command("/update_weights_from_tensor", request, deadline_s)

    async def end_weight_update(self, *, deadline_s: float | None = None) -> None:
        """Close the weight update."""
        await self._command("/end_weight_update", {}, deadline_s)

    async def update_from_disk(self, directory: str | Path, version: str, *, deadline_s: float | None = None) -> None:
        """Load the safetensors in `directory` (same architecture) and empty the cache.

        Returns when every rank of the server has read its part, so that the caller may delete the files.
        """
        request = {
            "model_path": str(directory),
            # Plain safetensors, also where the server was started with another format (flash_rl for FP8).
            "load_format": "auto",
            "weight_version": version,
            "flush_cache": not self._in_place,
        }
        await self._command("/update_weights_from_disk", request, deadline_s)
        # SGLang answers when its first rank has loaded. The checker gathers from all ranks, here without any tensor:
        # every name contains "".
        await self._command("/weights_checker", {"action": "checksum", "skip_tensor_list": [""]}, deadline_s)
        self.source = str(directory)

    async def pause(self, mode: Literal["abort", "retract", "in_place"] = "retract") -> None:
        """Stop sampling: `abort` ends running requests, `retract` and `in_place` hold them.

        Held by `in_place` they keep their cache, and so does an update that comes before `continue_`.
        """
        await self._post("/pause_generation", {"mode": mode})
        self._in_place = mode == "in_place"

    async def continue_(self) -> None:
        """Resume sampling after `pause`."""
        await self._post("/continue_generation", {})
        self._in_place = False

    async def reset(self, *, deadline_s: float) -> None:
        """End what an earlier caller may have left in flight: held and running requests, an open weight update."""
        await self._post("/continue_generation", {}, deadline_s)
        try:
            await self._command("/end_weight_update", {}, deadline_s)
        except RequestRefused as refusal:
            if "no weight-update session is open" not in refusal.said:
                raise
        await self._post("/pause_generation", {"mode": "abort"}, deadline_s)
        await self._post("/continue_generation", {}, deadline_s)
        self._in_place = False
        self.source = (await self.served(deadline_s=deadline_s)).model_path

    async def sleep(self, tags: Sequence[str] = (), *, deadline_s: float | None = None) -> None:
        """Release the memory of `tags` (`kv_cache`, `weights`; all), on an idle server with `--enable-memory-saver`.

        A server on a CPU dies of it.
        """
        await self._post("/release_memory_occupation", {"tags": list(tags)}, deadline_s)

    async def wake(self, tags: Sequence[str] = (), *, deadline_s: float | None = None) -> None:
        """Allocate that memory again after a release; the weights are lost: update them before sampling."""
        await self._post("/resume_memory_occupation", {"tags": list(tags)}, deadline_s)

    async def flush_cache(self) -> None:
        """Empty the radix cache; refused while requests run."""
        await self._post("/flush_cache", None)

    async def checksums(self, *, deadline_s: float | None = None) -> tuple[dict[str, str], ...]:
        """Return the checksum of every tensor of the weights under SGLang's (fused) names, one dict for each TP rank.

        `serving.checksums` computes the same from Hugging Face-named tensors.
        """
        reply = await self._command("/weights_checker", {"action": "checksum"}, deadline_s, _CHECKSUMS_LIMIT)
        return self._read("/weights_checker", lambda r: tuple(map(_of_weights, r["ranks"])), reply)

    async def health(self, *, deadline_s: float = 10.0) -> None:
        """Return where the server answers /health within the deadline, else raise."""
        await self._request("GET", "/health", None, deadline_s)

    async def served(self, *, deadline_s: float | None = None) -> ServedModel:
        """Return which weights the server reports that it serves."""
        reply = await self._request("GET", "/model_info", None, deadline_s)
        return self._read("/model_info", lambda body: msgspec.convert(body, ServedModel), reply)

    async def check_served(self, version: str | None, *, deadline_s: float | None = None) -> None:
        """Check that the server has the weights that were pushed to it.

        Raises:
            WeightsReplaced: it has another version, or loaded its weights from another path.
        """
        served = await self.served(deadline_s=deadline_s)
        held = {"weight_version": served.weight_version, "model_path": served.model_path}
        ours = {"weight_version": version, "model_path": self.source}
        if other := [name for name in held if held[name] != ours[name]]:
            raise WeightsReplaced(
                f"{self.name} ({self.url}) serves weights of {other[0]} {held[other[0]][:200]!r}, not "
                f"{ours[other[0]]!r} as this run requested: another client has changed them."
            )

    async def info(self, *, deadline_s: float | None = None) -> dict[str, Any]:
        """Return /get_model_info: model_path, weight_version and more."""
        return self._read("/get_model_info", dict, await self._request("GET", "/get_model_info", None, deadline_s))

    async def loaders(self) -> list[str]:
        """Return the functions that the server's `--custom-weight-loader` names."""
        reply = await self._request("GET", "/server_info", None, None)
        self._start = self._read("/server_info", lambda r: int(r["random_seed"]), reply)
        return self._read("/server_info", lambda r: list(r["custom_weight_loader"] or ()), reply)

    @property
    def _key(self) -> str:
        """Return the key that requests show; empty where the server requires none."""
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    async def _command(
        self, path: str, request: dict, deadline_s: float | None = None, limit: int = REPLY_LIMIT
    ) -> dict:
        reply = await self._post(path, request, deadline_s, limit)
        if not isinstance(reply, dict) or reply.get("success") is not True:
            raise self._error(path, f"refused: {str(reply)[:2000]}")
        return reply


def _of_weights(rank: Mapping[str, Any]) -> dict[str, str]:
    """Return the checksums that a rank reports, but of buffers that are derived from the config."""
    return {name: checksum for name, checksum in rank["checksums"].items() if is_weight(name)}
