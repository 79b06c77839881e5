"""torch's stores, through which processes find each other and exchange records, for processes that share a key.

A TCPStore has no authentication and listens on every interface. Here it listens at one address; its names begin with
a prefix that only a holder of the key can compute; and a record is accepted only with the key's authentication code. A
process that can connect can still list and delete what is in it: that stops a run, but does not steer it.
"""

import socket
from datetime import timedelta

import torch.distributed as dist

from exprl_megatron.utils.authentication import NotAuthentic, hidden_name, sign, verify
from exprl_megatron.utils.ports import EVERYWHERE, LOCAL

_BACKLOG = 4096


def start_store(address: str, port: int, timeout_s: float) -> dist.TCPStore:
    """Return a store of this process that listens at `address` alone, at `port` (0: any free one). Raises OSError."""
    # torch's own socket would listen on every interface, whatever the address.
    listening = socket.create_server((address, port), backlog=_BACKLOG)
    return dist.TCPStore(
        LOCAL if address == EVERYWHERE else address,
        listening.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        # The store closes it.
        master_listen_fd=listening.detach(),
    )


def connect_store(address: str, port: int, timeout_s: float) -> dist.TCPStore:
    """Return a connection of its own to a store that listens elsewhere. Raises torch's DistError."""
    timeout = timedelta(seconds=timeout_s)
    return dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)


def keyed_names(store: dist.Store, key: str | None, purpose: str) -> dist.Store:
    """Return `store` under names that only holders of `key` can compute; without a key, `store` itself."""
    return dist.PrefixStore(hidden_name(key, purpose), store) if key else store


class Records:
    """Records of one `purpose` in a store, each accepted only with its authentication code."""

    def __init__(self, store: dist.TCPStore, key: str, purpose: str):
        self.host, self.port = store.host, store.port
        self.key = key
        self._purpose = purpose
        self._store = keyed_names(store, key, purpose)

    def set(self, name: str, record: str | bytes) -> None:
        """Put `record` there, in place of any before."""
        data = record.encode() if isinstance(record, str) else record
        self._store.set(name, sign(self.key, self._of(name), data))

    def get(self, name: str) -> bytes:
        """Wait for the record and return it. Raises NotAuthentic where another wrote it, RuntimeError after a
        timeout.
        """
        return bytes(verify(self.key, self._of(name), self._store.get(name)))

    def check(self, names: list[str]) -> bool:
        """Return whether all `names` have a record; `get` verifies it."""
        return self._store.check(names)

    def has(self, name: str) -> bool:
        """Return whether there is an authentic record."""
        try:
            return self._store.check([name]) and self.get(name) is not None
        except NotAuthentic:
            return False

    def delete(self, name: str) -> None:
        """Delete the record."""
        self._store.delete_key(name)

    def add(self, name: str, number: int) -> int:
        """Add to a counter, which is not authenticated, and return its new value."""
        return self._store.add(name, number)

    def _of(self, name: str) -> str:
        return f"{self._purpose}: {name}"
