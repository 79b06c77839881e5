"""SGLang plugin: the stores in which a server's own ranks meet listen at the server's address, not on every interface.

Found through the `.dist-info` beside it, in every process of a server whose PYTHONPATH has this directory.
"""

import importlib
import socket
from functools import wraps


def activate() -> None:
    """Give the stores that torch makes for an init method a socket of their own address."""
    # The package's attribute of this name is a function.
    rendezvous = importlib.import_module("torch.distributed.rendezvous")
    if not hasattr(rendezvous.TCPStore, "__wrapped__"):
        rendezvous.TCPStore = at_its_address(rendezvous.TCPStore)


def at_its_address(store: type) -> type:
    """Wrap `torch.distributed.TCPStore`, so that it listens only at `host_name` where this process holds the store."""

    @wraps(store, updated=())
    def made(host_name: str, port: int, *arguments, is_master: bool = False, **settings):
        # torchrun's agent may hold the store at that port; then torch's own way finds it.
        if is_master and "master_listen_fd" not in settings and (listening := _listening(host_name, port)) is not None:
            port, settings["master_listen_fd"] = listening.getsockname()[1], listening.detach()
        return store(host_name, port, *arguments, is_master=is_master, **settings)

    return made


def _listening(host: str, port: int) -> socket.socket | None:
    """Return a listening socket; None where `host` is not an address of this machine."""
    try:
        return socket.create_server((socket.gethostbyname(host), port))
    except OSError:
        return None
