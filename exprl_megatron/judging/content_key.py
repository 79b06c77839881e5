"""Content hashes as keys: the same question has the same key in every run."""

import hashlib
import json
from collections.abc import Sequence

Scalar = str | int | float | bool | None


def content_key(kind: str, /, **parts: Scalar) -> str:
    """Hash the canonical JSON of `kind` and the named parts with SHA-256; returns the hexadecimal digest.

    The order of the parts does not matter; their names, values and types do (1, 1.0, True and "1" differ).

    Raises:
        TypeError: a part is not a scalar.
        ValueError: a part is nan or infinite.
    """
    for name, value in parts.items():
        if not isinstance(value, Scalar):
            raise TypeError(f"the part {name} of a content key is a {type(value).__name__}, not a scalar")
    return hashlib.sha256(_json([kind, parts]).encode()).hexdigest()


def content_keys(kind: str, name: str, texts: Sequence[str], /, **parts: Scalar) -> list[str]:
    """Return `content_key(kind, **parts, name=text)` for each of `texts`.

    Where a text extends the one before it, only the extension is hashed.
    """
    head, separator, tail = _json([kind, {**parts, name: ""}]).rpartition(f'{_json(name)}:""')
    shared = hashlib.sha256((head + separator[:-1]).encode())
    keys, state, before = [], shared.copy(), ""
    for text in texts:
        if not text.startswith(before):
            state, before = shared.copy(), ""
        # JSON writes a text character by character.
        state.update(_json(text[len(before) :])[1:-1].encode())
        before = text
        whole = state.copy()
        whole.update(f'"{tail}'.encode())
        keys.append(whole.hexdigest())
    return keys


def _json(value) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
