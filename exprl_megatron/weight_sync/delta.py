"""Weight sync through a shared directory: all weights the first time, then only the changes.

The trainer keeps the last version in `directory`/full and compares with it. On each server's machine an agent (see
delta_agent.py) holds a copy of its own, which the server loads. Agents on rank 0's machine are started here; agents on
other machines must run before the first sync.
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
from typing import Any

from exprl_megatron.errors import ServerError
from exprl_megatron.processes.supervise import supervised_command
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.utils.required import required
from exprl_megatron.utils.together import gather_or_cancel
from exprl_megatron.weight_sync.base_snapshot import VERSION, BaseSnapshot, DeltaWriter
from exprl_megatron.weight_sync.coordinator import RankCoordinator
from exprl_megatron.weight_sync.delta_agent import FULL, REQUEST, answer_path, write_whole
from exprl_megatron.weight_sync.disk import FileTransport, SafetensorsFiles, copy_description
from exprl_megatron.weight_sync.groups import host_of, is_local_host
from exprl_megatron.weight_sync.rounds import send_rounds
from exprl_megatron.weight_sync.timing import SyncTimes
from exprl_megatron.weight_sync.weight_exporter import FilledBucket, WeightExporter

_POLL_S = 0.05


class DeltaTransport(FileTransport):
    """See Transport. Sends the changes to agents, which hold a copy of the weights."""

    def __init__(
        self,
        clients: Sequence[SGLangClient],
        directory: Path,
        model: Path,
        coordinator: RankCoordinator,
        deadline_s: float,
    ):
        super().__init__(clients, directory, model, coordinator, deadline_s)
        self._request_id: str | None = None
        self._agents: list[subprocess.Popen] = []

    async def push(self, exporter: WeightExporter, version: str, times: SyncTimes) -> None:
        """Send all rounds of `exporter` as `version` and add the seconds to `times`; rank 0 only.

        Raises:
            ServerError: a server refuses, dies or exceeds the deadline.
        """
        with self._coordinator.abort_on_error():
            if self._request_id is None:
                self._begin()
            kind, file = await self._write(exporter, version, times)
            started = time.monotonic()
            self._request_id = uuid.uuid4().hex
            request = {"id": self._request_id, "kind": kind, "file": file, "version": version}
            write_whole(self._directory / REQUEST, request)
            await gather_or_cancel(self._load(client, version) for client in self._clients)
            times.load_s += time.monotonic() - started
            if kind != FULL:
                (self._directory / file).unlink()
            self._coordinator.signal()

    def connect(self, clients: Sequence[SGLangClient]) -> None:
        """Push weights to these servers from now on; releases what was shared with the former ones. A collective."""
        super().connect(clients)
        # Every agent starts with full weights again.
        self._end_agents()
        self._request_id = None

    async def close(self) -> None:
        """Release everything on the servers except the weights; rank 0 only."""
        self._end_agents()
        await super().close()

    def _end_agents(self) -> None:
        for agent in self._agents:
            agent.terminate()
        for agent in self._agents:
            agent.wait()
        self._agents = []

    def _begin(self) -> None:
        """Start the agents of this machine."""
        self._directory.mkdir(parents=True, exist_ok=True)
        # An interrupted run may have left a request.
        (self._directory / REQUEST).unlink(missing_ok=True)
        for host in {_host(client) for client in self._clients}:
            if is_local_host(host):
                agent = [sys.executable, "-m", "exprl_megatron.weight_sync.delta_agent", str(self._directory)]
                agent += [str(self._directory / f"local-{host}"), host]
                self._agents.append(subprocess.Popen(supervised_command(agent)))

    async def _write(self, exporter: WeightExporter, version: str, times: SyncTimes) -> tuple[str, str]:
        """Write full weights the first time, later the changes; returns which of both, and the file's name."""
        full, count = self._directory / FULL, len(exporter.rounds)
        if self._request_id is None:
            shutil.rmtree(full, ignore_errors=True)
            full.mkdir()
            copy_description(self._model, full)
            files = SafetensorsFiles(full, times)
            await send_rounds(count, self._coordinator, exporter.gather, files.add)
            files.finish()
            (full / VERSION).write_text(version)
            return FULL, FULL
        writer = DeltaWriter(BaseSnapshot(full), self._directory / f"{version}.delta", version)

        async def add(number: int, filled: FilledBucket | None) -> None:
            started = time.monotonic()
            await asyncio.to_thread(writer.add, required(filled, "the message of a round").named())
            times.send_s += time.monotonic() - started

        await send_rounds(count, self._coordinator, exporter.gather, add)
        times.moved += writer.finish()
        return "delta", f"{version}.delta"

    async def _load(self, client: SGLangClient, version: str) -> None:
        """Make a server load its agent's copy when that is complete."""
        path = answer_path(self._directory, _host(client))
        deadline = time.monotonic() + self._deadline_s
        while True:
            answer: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"id": None}
            if answer["id"] == self._request_id:
                break
            if time.monotonic() > deadline:
                raise ServerError(
                    f"The delta agent on {_host(client)}, for {client.name}, did not apply {version} within "
                    f"sync.deadline_s ({self._deadline_s:g} s); see that it runs: python -m "
                    f"exprl_megatron.weight_sync.delta_agent {self._directory} LOCAL {_host(client)}."
                )
            await asyncio.sleep(_POLL_S)
        if answer["error"] is not None:
            raise ServerError(f"The delta agent on {_host(client)}, for {client.name}, failed: {answer['error']}")
        await client.update_from_disk(answer["local"], version, deadline_s=self._deadline_s)


def _host(client: SGLangClient) -> str:
    return host_of(client.url)
