"""A full copy of the weights on disk that deltas update: the trainer's, and one on each server's machine.

A delta is one file: a line of JSON with the version it leads to, the version it starts from, and for each changed
tensor its SHA-256 afterwards and how many bytes follow; then these bytes, the exclusive or of old and new compressed
by zstandard. Unchanged numbers are zeros in it, so that it has little more than the changed bytes.
"""

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy
import zstandard

from exprl_megatron.errors import UserError
from exprl_megatron.models.name_map import Bucket
from exprl_megatron.serving.tensor_bytes import tensor_bytes

VERSION = "version.txt"
_LEVEL = 1


class BaseSnapshot:
    """The safetensors in `directory`, by tensor; they are overwritten in place."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._places = dict(_places(directory))

    @property
    def version(self) -> str:
        """Version of the weights that the snapshot has."""
        return (self._directory / VERSION).read_text()

    @version.setter
    def version(self, version: str) -> None:
        (self._directory / VERSION).write_text(version)

    def read(self, name: str) -> numpy.ndarray:
        """Return the bytes of the tensor `name`: uint8 [bytes]."""
        path, start, size = self._places[name]
        return numpy.fromfile(path, numpy.uint8, size, offset=start)

    def write(self, name: str, data: numpy.ndarray) -> None:
        """Replace the bytes of the tensor `name` by `data`, uint8 [bytes].

        Raises:
            ValueError: `data` has another number of bytes.
        """
        path, start, size = self._places[name]
        if data.nbytes != size:
            raise ValueError(f"{name} has {size} bytes in {path}, not {data.nbytes}")
        with open(path, "r+b") as file:
            file.seek(start)
            file.write(data.data)


class DeltaWriter:
    """Writes the differences from a snapshot, bucket by bucket, and updates the snapshot."""

    def __init__(self, snapshot: BaseSnapshot, path: Path, version: str):
        self._snapshot = snapshot
        self._path = path
        self._head: dict = {"version": version, "base": snapshot.version, "tensors": []}
        self._blobs: list[bytes] = []

    def add(self, bucket: Bucket) -> None:
        """Add the changes of a bucket's tensors."""
        for name, tensor in bucket:
            new = numpy.frombuffer(tensor_bytes(tensor.detach().cpu().contiguous()), numpy.uint8)
            difference = numpy.bitwise_xor(self._snapshot.read(name), new)
            if difference.any():
                blob = zstandard.ZstdCompressor(_LEVEL).compress(difference.data)
                entry = {"name": name, "bytes": len(blob), "sha256": hashlib.sha256(new.data).hexdigest()}
                self._head["tensors"].append(entry)
                self._blobs.append(blob)
                self._snapshot.write(name, new)

    def finish(self) -> int:
        """Write the file atomically; returns its size in bytes."""
        partial = self._path.with_suffix(".partial")
        with open(partial, "wb") as file:
            file.write(json.dumps(self._head).encode() + b"\n")
            file.writelines(self._blobs)
        size = partial.stat().st_size
        partial.rename(self._path)
        self._snapshot.version = self._head["version"]
        return size


def apply_delta(snapshot: BaseSnapshot, path: Path) -> str:
    """Apply the delta in `path` to `snapshot`; returns the name of the new version.

    Raises:
        UserError: the delta starts from another version than the snapshot has, and where a tensor does not match its
            checksum afterwards: the snapshot must then be written again.
    """
    with open(path, "rb") as file:
        head = json.loads(file.readline())
        if head["base"] != snapshot.version:
            raise UserError(
                f"{path} starts from version {head['base']}, but the snapshot has {snapshot.version}; delete it."
            )
        for entry in head["tensors"]:
            difference = zstandard.ZstdDecompressor().decompress(file.read(entry["bytes"]))
            new = numpy.bitwise_xor(snapshot.read(entry["name"]), numpy.frombuffer(difference, numpy.uint8))
            if hashlib.sha256(new.data).hexdigest() != entry["sha256"]:
                raise UserError(f"{path}: tensor {entry['name']} does not match its checksum; delete the snapshot.")
            snapshot.write(entry["name"], new)
    snapshot.version = head["version"]
    return head["version"]


def _places(directory: Path) -> Iterator[tuple[str, tuple[Path, int, int]]]:
    """Yield file, offset and size of each tensor, from the files' headers."""
    for path in sorted(directory.glob("*.safetensors")):
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                yield name, (path, 8 + length + start, stop - start)
