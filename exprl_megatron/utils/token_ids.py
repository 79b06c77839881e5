"""Token ids of requests: parts that several requests share are written as JSON once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec


@dataclass(frozen=True)
class TokenPart:
    """Token ids that several requests share."""

    json: bytes
    """The ids as JSON writes them in a list, without its brackets."""
    count: int

    @classmethod
    def of(cls, ids: Sequence[int]) -> "TokenPart":
        """Build the part from Python's integers."""
        return cls(msgspec.json.encode(ids)[1:-1], len(ids))


class TokenIds(Sequence[int]):
    """The token ids of one request, in parts; immutable."""

    def __init__(self, *parts: TokenPart):
        self._parts = tuple(part for part in parts if part.count)
        self._length = sum(part.count for part in self._parts)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        return iter(self.tolist())

    def __getitem__(self, index):
        return self.tolist()[index]

    @property
    def json(self) -> bytes:
        """The list in JSON."""
        return b"[" + b",".join(part.json for part in self._parts) + b"]"

    def tolist(self) -> list[int]:
        """Return the ids as Python's integers."""
        return msgspec.json.decode(self.json)
