"""Weight sync through a directory of safetensors that trainer and servers share (SGLang's `from_disk`)."""

import asyncio
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from exprl_megatron.models.weight_readers import INDEX
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.utils.required import required
from exprl_megatron.utils.together import gather_or_cancel
from exprl_megatron.weight_sync.coordinator import RANK_ZERO, RankCoordinator
from exprl_megatron.weight_sync.rounds import send_rounds
from exprl_megatron.weight_sync.timing import SyncTimes
from exprl_megatron.weight_sync.weight_exporter import FilledBucket, WeightExporter


class FileTransport:
    """Base of the transports through files, which rank 0 writes to `directory`.

    `model` is the directory whose config and tokenizer the weights belong to; `clients` are needed on rank 0 alone.
    """

    source_ranks = ((RANK_ZERO,),)

    def __init__(
        self,
        clients: Sequence[SGLangClient],
        directory: Path,
        model: Path,
        coordinator: RankCoordinator,
        deadline_s: float,
    ):
        self._clients = clients
        self._directory = directory
        self._model = model
        self._coordinator = coordinator
        self._deadline_s = deadline_s

    def connect(self, clients: Sequence[SGLangClient]) -> None:
        """Push weights to these servers from now on; releases what was shared with the former ones. A collective."""
        self._clients = list(clients)

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Allocate a bucket: uint8 [nbytes], in host memory."""
        # Files are written from host memory.
        return torch.empty(nbytes, dtype=torch.uint8)

    def follow(self, exporter: WeightExporter) -> None:
        """Take part in `push` on the other ranks.

        Raises:
            RankZeroFailed: rank 0 has an error.
        """
        for number in range(len(exporter.rounds)):
            self._coordinator.wait_signal()
            exporter.gather(number)
        self._coordinator.wait_signal()

    async def close(self) -> None:
        """Release everything on the servers except the weights; rank 0 only."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def follow_close(self) -> None:
        """Take part in `close` on the other ranks."""
        return None


class DiskTransport(FileTransport):
    """See Transport. All weights are written once and read by every server."""

    async def push(self, exporter: WeightExporter, version: str, times: SyncTimes) -> None:
        """Send all rounds of `exporter` as `version` and add the seconds to `times`; rank 0 only.

        Raises:
            ServerError: a server refuses, dies or exceeds the deadline.
        """
        target = self._directory / version
        with self._coordinator.abort_on_error():
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            copy_description(self._model, target)
            files = SafetensorsFiles(target, times)
            await send_rounds(len(exporter.rounds), self._coordinator, exporter.gather, files.add)
            files.finish()
            started = time.monotonic()
            await gather_or_cancel(
                client.update_from_disk(target, version, deadline_s=self._deadline_s) for client in self._clients
            )
            times.load_s += time.monotonic() - started
            shutil.rmtree(target)
            self._coordinator.signal()


class SafetensorsFiles:
    """Writes one safetensors file for each round, and their index."""

    def __init__(self, target: Path, times: SyncTimes):
        self._target = target
        self._times = times
        self._weight_map: dict[str, str] = {}
        self._size = 0

    async def add(self, number: int, gathered: FilledBucket | None) -> None:
        """Write a round's file, on a thread."""
        started, filled = time.monotonic(), required(gathered, "the message of a round")
        name = f"model-{number + 1:05d}.safetensors"
        await asyncio.to_thread(save_file, dict(filled.named()), self._target / name, metadata={"format": "pt"})
        self._weight_map |= {slot.name: name for slot in filled.message.slots}
        self._size += filled.message.nbytes
        self._times.moved += filled.message.nbytes
        self._times.send_s += time.monotonic() - started

    def finish(self) -> None:
        """Write the index."""
        index = {"metadata": {"total_size": self._size}, "weight_map": self._weight_map}
        (self._target / INDEX).write_text(json.dumps(index, indent=2))


def copy_description(model: Path, target: Path) -> None:
    """Copy config and tokenizer of a model directory."""
    for path in model.iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja") and "safetensors" not in path.name:
            shutil.copyfile(path, target / path.name)
