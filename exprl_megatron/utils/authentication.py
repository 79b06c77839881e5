"""Message authentication codes of a run's processes: HMAC-SHA256 under the run's key.

A code is computed for one purpose, so a message of one kind is never accepted as one of another kind.
"""

import hashlib
import hmac

MAC_BYTES = 32


class NotAuthentic(ValueError):
    """A message that was written without the run's key, or that was changed in transit."""


def mac(key: str, purpose: str, data: bytes | memoryview) -> bytes:
    """Return the message authentication code of `data`, of MAC_BYTES bytes."""
    kind = purpose.encode()
    digest = hmac.new(key.encode(), len(kind).to_bytes(4, "big") + kind, hashlib.sha256)
    digest.update(data)
    return digest.digest()


def verify_mac(claimed: bytes | memoryview, key: str, purpose: str, data: bytes | memoryview) -> bool:
    """Return whether `claimed` is the code of `data`; the comparison takes constant time."""
    return hmac.compare_digest(claimed, mac(key, purpose, data))


def sign(key: str, purpose: str, data: bytes) -> bytes:
    """Return the code of `data` followed by `data`."""
    return mac(key, purpose, data) + data


def verify(key: str, purpose: str, signed: bytes | memoryview) -> memoryview:
    """Return the data of a message that `sign` made.

    Raises:
        NotAuthentic: the code is not that of the data.
    """
    view = memoryview(signed)
    data = view[MAC_BYTES:]
    if not verify_mac(view[:MAC_BYTES], key, purpose, data):
        raise NotAuthentic(f"{purpose!r} was written without this run's key")
    return data


def hidden_name(key: str, purpose: str) -> str:
    """Return a name that only a holder of the key can compute: 128 bits of HMAC in hexadecimal digits."""
    return mac(key, purpose, b"name").hex()[:32]
