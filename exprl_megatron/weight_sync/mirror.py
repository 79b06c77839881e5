"""A full copy of the weights on disk that deltas keep up to date: the trainer's, and one on each server's machine.

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


class Mirror:
    """The safetensors in `directory`, by tensor; they are overwritten in place."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._places = dict(_places(directory))

    @property
    def version(self) -> str:
        """The version of the weights that it holds."""
        return (self._directory / VERSION).read_text()

    @version.setter
    def version(self, version: str) -> None:
        (self._directory / VERSION).write_text(version)

    def read(self, name: str) -> numpy.ndarray:
        """The tensor's bytes, uint8."""
        path, start, size = self._places[name]
        return numpy.fromfile(path, numpy.uint8, size, offset=start)

    def write(self, name: str, data: numpy.ndarray) -> None:
        """Replace the tensor's bytes."""
        path, start, size = self._places[name]
        if data.nbytes != size:
            raise ValueError(f"{name} has {size} bytes in {path}, not {data.nbytes}")
        with open(path, "r+b") as file:
            file.seek(start)
            file.write(data.data)


class DeltaWriter:
    """Writes what differs from a mirror, bucket by bucket, and brings the mirror along."""

    def __init__(self, mirror: Mirror, path: Path, version: str):
        self._mirror = mirror
        self._path = path
        self._head: dict = {"version": version, "base": mirror.version, "tensors": []}
        self._blobs: list[bytes] = []

    def add(self, bucket: Bucket) -> None:
        """What changed in a bucket's tensors."""
        for name, tensor in bucket:
            new = numpy.frombuffer(tensor_bytes(tensor.detach().cpu().contiguous()), numpy.uint8)
            difference = numpy.bitwise_xor(self._mirror.read(name), new)
            if difference.any():
                blob = zstandard.ZstdCompressor(_LEVEL).compress(difference.data)
                told = {"name": name, "bytes": len(blob), "sha256": hashlib.sha256(new.data).hexdigest()}
                self._head["tensors"].append(told)
                self._blobs.append(blob)
                self._mirror.write(name, new)

    def finish(self) -> int:
        """Write the file, complete by one rename; its size in bytes."""
        partial = self._path.with_suffix(".partial")
        with open(partial, "wb") as file:
            file.write(json.dumps(self._head).encode() + b"\n")
            file.writelines(self._blobs)
        size = partial.stat().st_size
        partial.rename(self._path)
        self._mirror.version = self._head["version"]
        return size


def apply_delta(mirror: Mirror, path: Path) -> str:
    """Bring `mirror` to the version that the delta in `path` leads to; its name.

    Raises UserError where the delta starts from another version than the mirror has, and where a tensor then is not
    what its checksum says: the mirror must then be made again.
    """
    with open(path, "rb") as file:
        head = json.loads(file.readline())
        if head["base"] != mirror.version:
            raise UserError(
                f"{path} leads from version {head['base']}, but the mirror has {mirror.version}; delete the mirror."
            )
        for told in head["tensors"]:
            difference = zstandard.ZstdDecompressor().decompress(file.read(told["bytes"]))
            new = numpy.bitwise_xor(mirror.read(told["name"]), numpy.frombuffer(difference, numpy.uint8))
            if hashlib.sha256(new.data).hexdigest() != told["sha256"]:
                raise UserError(f"{path}: tensor {told['name']} is not what its checksum says; delete the mirror.")
            mirror.write(told["name"], new)
    mirror.version = head["version"]
    return head["version"]


def _places(directory: Path) -> Iterator[tuple[str, tuple[Path, int, int]]]:
    """File, offset and size of each tensor, from the files' headers."""
    for path in sorted(directory.glob("*.safetensors")):
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for name, told in header.items():
            if name != "__metadata__":
                start, stop = told["data_offsets"]
                yield name, (path, 8 + length + start, stop - start)
