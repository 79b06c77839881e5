"""The local machine: its ports, and its name."""

import os
import random
import socket
from collections.abc import Mapping, Set

# Below the ports that the kernel gives to outgoing connections: one of those may be taken while a server starts.
_RANGE = range(20_000, 32_000)
LOCAL = "127.0.0.1"
EVERYWHERE = "0.0.0.0"
_GLOO = "GLOO_SOCKET_IFNAME"


def is_free(port: int, host: str = LOCAL) -> bool:
    """Return whether a server could listen on `port` now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_ports(count: int, taken: Set[int] = frozenset()) -> list[int]:
    """Return `count` different ports on which nothing listens and which are not in `taken`.

    Raises:
        OSError: there are not that many.
    """
    candidates = random.SystemRandom().sample(_RANGE, len(_RANGE))
    found: list[int] = []
    for port in candidates:
        if len(found) == count:
            return found
        if port not in taken and is_free(port):
            found.append(port)
    raise OSError(f"fewer than {count} free ports between {_RANGE.start} and {_RANGE.stop}")


def this_host() -> str:
    """Return the name under which other machines of the job reach this one: Slurm's for the node, else the machine's
    own.
    """
    node = os.environ.get("SLURMD_NODENAME")
    return node if node and _resolves(node) else socket.gethostname()


def interface(host: str) -> str:
    """Return the address to listen at so that others reach this machine as `host`: that of the name, which they resolve
    too.

    All interfaces where a machine's name means loopback here, as in Debian's /etc/hosts, or nothing: others know it by
    another address. Loopback where it is asked for by its own name or number: then all is on this machine.
    """
    if host == "localhost" or host.startswith("127."):
        return socket.gethostbyname(host)
    try:
        address = socket.gethostbyname(host)
    except OSError:
        return EVERYWHERE
    return EVERYWHERE if address.startswith("127.") else address


def gloo_on_loopback(inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the variable that makes gloo's groups listen on loopback alone, where all members are on this machine.

    Gloo would choose the interface of the machine's name. What the user has set is kept.
    """
    return {_GLOO: inherited.get(_GLOO, "lo")}


def _resolves(name: str) -> bool:
    try:
        socket.gethostbyname(name)
    except OSError:
        return False
    return True
