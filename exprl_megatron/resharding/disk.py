"""Weights through a directory of safetensors that trainer and servers both see."""

import asyncio
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from safetensors.torch import save_file

from exprl_megatron.resharding.transport import Bucket
from exprl_megatron.serving.client import SGLangClient


class DiskTransport:
    """See Transport. `model` is the directory whose config and tokenizer the weights belong to."""

    def __init__(self, clients: Sequence[SGLangClient], directory: Path, model: Path, deadline_s: float):
        self._clients = clients
        self._directory = directory
        self._model = model
        self._deadline_s = deadline_s

    async def push(self, buckets: Iterable[Bucket], version: str) -> None:
        target = self._directory / version
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for path in self._model.iterdir():
            if path.is_file() and path.suffix in (".json", ".jinja") and "safetensors" not in path.name:
                shutil.copyfile(path, target / path.name)
        _write(buckets, target)
        await asyncio.gather(
            *(client.update_from_disk(target, version, deadline_s=self._deadline_s) for client in self._clients)
        )
        shutil.rmtree(target)

    async def close(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)


def _write(buckets: Iterable[Bucket], target: Path) -> None:
    """One safetensors file for each bucket, and their index."""
    weight_map, size = {}, 0
    for number, bucket in enumerate(buckets, start=1):
        name = f"model-{number:05d}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in bucket}, target / name, metadata={"format": "pt"})
        weight_map |= {key: name for key, _ in bucket}
        size += sum(tensor.numel() * tensor.element_size() for _, tensor in bucket)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
