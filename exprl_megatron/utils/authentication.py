"""Codes by which the processes of a run know each other's messages: HMAC-SHA256 under the run's key.

A code is made for one purpose, so that a message of one kind is never taken for one of another kind.
"""

import hashlib
import hmac

CODE_BYTES = 32


class NotAuthentic(ValueError):
    """A message that somebody without the run's key wrote, or that was changed on its way."""


def code(key: str, purpose: str, data: bytes | memoryview) -> bytes:
    """The authentication code of `data`, CODE_BYTES long."""
    kind = purpose.encode()
    digest = hmac.new(key.encode(), len(kind).to_bytes(4, "big") + kind, hashlib.sha256)
    digest.update(data)
    return digest.digest()


def is_code(claimed: bytes | memoryview, key: str, purpose: str, data: bytes | memoryview) -> bool:
    """Whether `claimed` is the code of `data`; how long it takes does not tell how much of it is right."""
    return hmac.compare_digest(claimed, code(key, purpose, data))


def seal(key: str, purpose: str, data: bytes) -> bytes:
    """`data` behind its code."""
    return code(key, purpose, data) + data


def unseal(key: str, purpose: str, sealed: bytes | memoryview) -> memoryview:
    """What `seal` was given. Raises NotAuthentic where the code is not that of the rest."""
    view = memoryview(sealed)
    data = view[CODE_BYTES:]
    if not is_code(view[:CODE_BYTES], key, purpose, data):
        raise NotAuthentic(f"somebody without this run's key wrote {purpose!r}")
    return data


def hidden_name(key: str, purpose: str) -> str:
    """A name that only a holder of the key can compute: 128 bits of HMAC in hexadecimal digits."""
    return code(key, purpose, b"name").hex()[:32]
