"""Texts of a judgement store: each is stored once, compressed with similar texts as dictionary."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable

import zstandard

_LEVEL = 5
_REMEMBERED = 64

TextRun = Callable[..., list[tuple]]
"""Runs an SQL statement, with parameters, and returns its rows."""


class StoredTexts:
    """The table `texts` of one connection; for one thread at a time."""

    def __init__(self, run: TextRun):
        self._run = run
        self._ids: OrderedDict[tuple[bytes, int | None], int] = OrderedDict()
        self._texts: OrderedDict[int, bytes] = OrderedDict()
        self._dictionaries: OrderedDict[tuple[bool, tuple[int, ...]], zstandard.ZstdCompressionDict] = OrderedDict()

    def add(self, text: bytes, base: int | None = None) -> int:
        """Return the id of `text`, which is written unless it exists, compressed with the text `base`.

        Call it within a transaction, and `clear_caches` where that fails.
        """
        digest = hashlib.sha256(text).digest()
        return _cached(self._ids, (digest, base), lambda: self._kept(digest, text, base))

    def read(self, text: int) -> bytes:
        """Return the text with the id `text`."""

        def stored() -> bytes:
            ((base, data),) = self._run("SELECT base, data FROM texts WHERE id = ?", (text,))
            return self.decompress(data, base)

        return _cached(self._texts, text, stored)

    def compress(self, text: bytes, *bases: int | None) -> bytes:
        """Compress `text` with the texts `bases` as dictionary."""
        return zstandard.ZstdCompressor(_LEVEL, self._dictionary(bases, True), write_checksum=False).compress(text)

    def decompress(self, data: bytes, *bases: int | None) -> bytes:
        """Undo `compress` with the same bases."""
        return zstandard.ZstdDecompressor(self._dictionary(bases, False)).decompress(data)

    def clear_caches(self) -> None:
        """Forget rows that were not committed."""
        for memory in (self._ids, self._texts, self._dictionaries):
            memory.clear()

    def _kept(self, digest: bytes, text: bytes, base: int | None) -> int:
        if not (rows := self._run("SELECT id FROM texts WHERE hash = ?", (digest,))):
            rows = self._run(
                "INSERT INTO texts (hash, base, data) VALUES (?, ?, ?) RETURNING id",
                (digest, base, self.compress(text, base)),
            )
        return rows[0][0]

    def _dictionary(self, bases: tuple[int | None, ...], compressing: bool) -> zstandard.ZstdCompressionDict | None:
        ids = tuple(base for base in bases if base is not None)

        def joined() -> zstandard.ZstdCompressionDict:
            content = b"".join(map(self.read, ids))
            made = zstandard.ZstdCompressionDict(content, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
            if compressing:
                made.precompute_compress(_LEVEL)
            return made

        return _cached(self._dictionaries, (compressing, ids), joined) if ids else None


def _cached[K, V](memory: OrderedDict[K, V], key: K, make: Callable[[], V]) -> V:
    """Return the cached value of `key`, made if needed; the least recently used value is evicted."""
    if key in memory:
        memory.move_to_end(key)
        return memory[key]
    made = make()
    memory[key] = made
    if len(memory) > _REMEMBERED:
        memory.popitem(last=False)
    return made
