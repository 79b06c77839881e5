"""JSON within HTML."""

import base64
import json
import zlib
from typing import Any


def embedded(value: Any) -> str:
    """Return JSON that ends no script element and opens no comment, whatever its texts are."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def compact(value: Any) -> bytes:
    """Return JSON in as few bytes as possible; its texts hold no lone surrogate (see `shown`)."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode()


def packed(value: Any) -> str:
    """Return `compact` JSON, compressed by gzip, in base64: letters and digits that HTML has no other meaning for."""
    stream = zlib.compressobj(9, wbits=31)
    return base64.b64encode(stream.compress(compact(value)) + stream.flush()).decode()
