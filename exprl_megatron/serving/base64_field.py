"""A field of a JSON reply whose value is a long base64 string, decoded without reading the string as JSON."""

import pybase64


def cut_base64(body: bytes, name: str) -> tuple[bytes, bytearray | None]:
    """Return `body` with null for the field `name`, and the bytes of its base64; None where it has no such string.

    A JSON string cannot hold the key with its quotes unescaped, so the key is a field's.

    Raises:
        ValueError: the field is there more than once, or is not a string in base64.
    """
    key = f'"{name}":'.encode()
    if (place := body.find(key)) < 0:
        return body, None
    start = place + len(key)
    opening = body.find(b'"', start, start + 16)
    if opening < 0 or body[start:opening].strip():
        # null, which is read as none, or something that the rest of the reply will be refused for.
        return body, None
    if (closing := body.find(b'"', opening + 1)) < 0:
        raise ValueError(f"{name} is not closed")
    if body.find(key, closing) >= 0:
        raise ValueError(f"{name} is there more than once")
    try:
        sent = pybase64.b64decode_as_bytearray(memoryview(body)[opening + 1 : closing], validate=True)
    except ValueError as error:
        raise ValueError(f"{name} is not base64 ({error})") from error
    return body[:start] + b"null" + body[closing + 1 :], sent
