"""Objects from rank to rank over gloo: none is unpickled before its authentication code is verified.

torch's own functions for objects unpickle what comes, and a pickle runs code. A peer that came into a group without
the run's key can send garbage; it cannot run anything here.
"""

import io
import pickle
from typing import Any

import torch
import torch.distributed as dist

from exprl_megatron.errors import RunStopped
from exprl_megatron.utils.authentication import MAC_BYTES, NotAuthentic, mac, verify

_PURPOSE = "object of a rank"
_key = ""


def use_key(key: str | None) -> None:
    """Set the key that authenticates this process's objects from now on; without a key anyone could make them."""
    global _key
    _key = key or ""


def broadcast_object[T](item: T, source: int, group: dist.ProcessGroup) -> T:
    """Return the `item` of rank `source` on every rank of `group`; a collective."""
    here = dist.get_rank() == source
    data = _signed(item) if here else torch.empty(0, dtype=torch.uint8)
    size = torch.tensor([len(data)])
    dist.broadcast(size, source, group=group)
    data = data if here else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(data, source, group=group)
    return item if here else _opened(data)


def gather_objects(item: Any, destination: int, group: dist.ProcessGroup) -> list[Any] | None:
    """Return every rank's `item` in the order of ranks on rank `destination`, and None elsewhere; a collective."""
    sizes, data = _alike(item, group)
    here = dist.get_rank() == destination
    gathered = [torch.empty_like(data) for _ in sizes] if here else None
    dist.gather(data, gathered, dst=destination, group=group)
    if gathered is None:
        return None
    return [_opened(one[:size]) for one, size in zip(gathered, sizes, strict=True)]


def all_gather_objects[T](item: T, group: dist.ProcessGroup) -> list[T]:
    """Return every rank's `item` in the order of ranks, on every rank; a collective."""
    sizes, data = _alike(item, group)
    gathered = [torch.empty_like(data) for _ in sizes]
    dist.all_gather(gathered, data, group=group)
    return [_opened(one[:size]) for one, size in zip(gathered, sizes, strict=True)]


def send_object(item: Any, destination: int, group: dist.ProcessGroup) -> None:
    """Send `item` to a rank that calls `receive_object`."""
    data = _signed(item)
    dist.send(torch.tensor([len(data)]), destination, group=group)
    dist.send(data, destination, group=group)


def receive_object(source: int, group: dist.ProcessGroup) -> Any:
    """Receive the object that rank `source` sends."""
    size = torch.empty(1, dtype=torch.int64)
    dist.recv(size, source, group=group)
    data = torch.empty(int(size), dtype=torch.uint8)
    dist.recv(data, source, group=group)
    return _opened(data)


def _alike(item: Any, group: dist.ProcessGroup) -> tuple[list[int], torch.Tensor]:
    """Return the sizes of all ranks' signed items, and this rank's, as long as the longest."""
    data = _signed(item)
    sizes = torch.empty(dist.get_world_size(group), dtype=torch.int64)
    dist.all_gather_single(sizes, torch.tensor([len(data)]), group=group)
    longest = int(sizes.max())
    return sizes.tolist(), torch.nn.functional.pad(data, (0, longest - len(data)))


def _signed(item: Any) -> torch.Tensor:
    """Return [bytes] uint8: the code, then the pickle."""
    # Sequences of a step are gigabytes: they are written once, behind the place for the code.
    buffer = io.BytesIO(bytes(MAC_BYTES))
    buffer.seek(0, io.SEEK_END)
    pickle.dump(item, buffer, pickle.HIGHEST_PROTOCOL)
    view = buffer.getbuffer()
    view[:MAC_BYTES] = mac(_key, _PURPOSE, view[MAC_BYTES:])
    return torch.frombuffer(view, dtype=torch.uint8)


def _opened(data: torch.Tensor) -> Any:
    """Return the item. Raises RunStopped where a peer does not have the key."""
    try:
        return pickle.loads(verify(_key, _PURPOSE, data.numpy().data))
    except NotAuthentic as error:
        raise RunStopped(
            f"A trainer process refuses a message of another one: {error}. Another program is connected to the run; "
            "see docs/cluster.md on networks, and continue with --resume."
        ) from error
