"""Weights through a directory that trainer and servers both see, after the first time only what changed of them.

The trainer keeps the last version in `directory`/full and compares with it; on each server's machine a keeper (see
delta_keeper) holds a copy of its own, which the server loads. Keepers on rank 0's machine are started here, those on
others must run before the first sync.
"""

import asyncio
import json
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from exprl_megatron.errors import ServerError
from exprl_megatron.processes.supervise import supervised
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.utils.together import gather_or_cancel
from exprl_megatron.weight_sync.coordinator import RankCoordinator
from exprl_megatron.weight_sync.delta_keeper import FULL, ORDER, answer_path, write_whole
from exprl_megatron.weight_sync.disk import FileTransport, SafetensorsFiles, copy_description
from exprl_megatron.weight_sync.groups import is_here
from exprl_megatron.weight_sync.mirror import VERSION, DeltaWriter, Mirror
from exprl_megatron.weight_sync.outgoing import Filled, Outgoing
from exprl_megatron.weight_sync.rounds import send_rounds
from exprl_megatron.weight_sync.timing import SyncTimes

_POLL_S = 0.05


class DeltaTransport(FileTransport):
    """See Transport: what changed, for keepers that hold the rest."""

    def __init__(
        self,
        clients: Sequence[SGLangClient],
        directory: Path,
        model: Path,
        coordinator: RankCoordinator,
        deadline_s: float,
    ):
        super().__init__(clients, directory, model, coordinator, deadline_s)
        self._order: str | None = None
        self._keepers: list[subprocess.Popen] = []

    async def push(self, outgoing: Outgoing, version: str, times: SyncTimes) -> None:
        with self._coordinator.abort_on_error():
            if self._order is None:
                self._begin()
            kind, file = await self._write(outgoing, version, times)
            started = time.monotonic()
            self._order = uuid.uuid4().hex
            order = {"id": self._order, "kind": kind, "file": file, "version": version}
            write_whole(self._directory / ORDER, order)
            await gather_or_cancel(self._load(client, version) for client in self._clients)
            times.load_s += time.monotonic() - started
            if kind != FULL:
                (self._directory / file).unlink()
            self._coordinator.signal()

    def connect(self, clients: Sequence[SGLangClient]) -> None:
        super().connect(clients)
        # All begin with full weights again.
        self._end_keepers()
        self._order = None

    async def close(self) -> None:
        self._end_keepers()
        await super().close()

    def _end_keepers(self) -> None:
        for keeper in self._keepers:
            keeper.terminate()
        for keeper in self._keepers:
            keeper.wait()
        self._keepers = []

    def _begin(self) -> None:
        """Start the keepers that can be started here."""
        self._directory.mkdir(parents=True, exist_ok=True)
        # A run that was interrupted may have left one.
        (self._directory / ORDER).unlink(missing_ok=True)
        for host in {_host(client) for client in self._clients}:
            if is_here(host):
                keeper = [sys.executable, "-m", "exprl_megatron.weight_sync.delta_keeper", str(self._directory)]
                keeper += [str(self._directory / f"local-{host}"), host]
                self._keepers.append(subprocess.Popen(supervised(keeper)))

    async def _write(self, outgoing: Outgoing, version: str, times: SyncTimes) -> tuple[str, str]:
        """The full weights the first time, later what changed; which of both, and the file's name."""
        full, count = self._directory / FULL, len(outgoing.rounds)
        if self._order is None:
            shutil.rmtree(full, ignore_errors=True)
            full.mkdir()
            copy_description(self._model, full)
            files = SafetensorsFiles(full, times)
            await send_rounds(count, self._coordinator, outgoing.gather, files.add)
            files.finish()
            (full / VERSION).write_text(version)
            return FULL, FULL
        writer = DeltaWriter(Mirror(full), self._directory / f"{version}.delta", version)

        async def add(number: int, filled: Filled) -> None:
            started = time.monotonic()
            await asyncio.to_thread(writer.add, filled.named())
            times.send_s += time.monotonic() - started

        await send_rounds(count, self._coordinator, outgoing.gather, add)
        times.moved += writer.finish()
        return "delta", f"{version}.delta"

    async def _load(self, client: SGLangClient, version: str) -> None:
        """Let a server load its keeper's copy once that is complete."""
        path = answer_path(self._directory, _host(client))
        deadline = time.monotonic() + self._deadline_s
        while True:
            answer = json.loads(path.read_text()) if path.is_file() else {"id": None}
            if answer["id"] == self._order:
                break
            if time.monotonic() > deadline:
                raise ServerError(
                    f"The keeper of deltas on {_host(client)}, for {client.name}, did not bring {version} within "
                    f"sync.deadline_s ({self._deadline_s:g} s); see that it runs: python -m "
                    f"exprl_megatron.weight_sync.delta_keeper {self._directory} LOCAL {_host(client)}."
                )
            await asyncio.sleep(_POLL_S)
        if answer["error"] is not None:
            raise ServerError(f"The keeper of deltas on {_host(client)}, for {client.name}, failed: {answer['error']}")
        await client.update_from_disk(answer["local"], version, deadline_s=self._deadline_s)


def _host(client: SGLangClient) -> str:
    return urlsplit(client.url).hostname
