"""Reads a judge's model directory: the context length, the vocabulary and the identity of the model."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path

from exprl_megatron.errors import UserError

_WHOLE_BYTES = 64 * 2**20
_SAMPLES, _SAMPLE_BYTES = 256, 2**16
_DESCRIPTIONS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "*.jinja")


def model_context(model: str) -> int:
    """Read the context length, in tokens, of the model in directory `model`.

    Raises:
        UserError: config.json cannot be read or does not have it.
    """
    path = Path(model) / "config.json"
    try:
        return int(json.loads(path.read_text())["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"The judge's context length cannot be read from {path} ({error!r}); "
            "give judge.model a directory whose config.json has max_position_embeddings."
        ) from error


def model_vocabulary(model: str) -> int | None:
    """Read the number of token ids of the model in directory `model`; None where config.json does not have it."""
    try:
        return int(json.loads((Path(model) / "config.json").read_text())["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@lru_cache(maxsize=16)
def model_identity(model: str) -> str:
    """Hash config, tokenizer and weights in directory `model` by content (SHA-256, hex).

    File names and times have no effect, so that copies of a model have the same identity. Of a weights file above
    64 MiB only the size, the header (names, shapes and offsets of the tensors) and 256 evenly spaced pieces of 64 KiB
    are read: training changes every tensor, and a 70B model is identified in a second. The result is cached.
    """
    directory = Path(model)
    digest = hashlib.sha256()
    for pattern in _DESCRIPTIONS:
        for path in sorted(directory.glob(pattern)):
            digest.update(b"%d:" % path.stat().st_size + path.read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        _update_by_weights(digest, path)
    return digest.hexdigest()


def _update_by_weights(digest: "hashlib._Hash", path: Path) -> None:
    size = path.stat().st_size
    digest.update(b"%d:" % size)
    with open(path, "rb") as file:
        if size <= _WHOLE_BYTES:
            digest.update(file.read())
            return
        digest.update(file.read(int.from_bytes(file.read(8), "little")))
        for i in range(_SAMPLES):
            file.seek((size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
