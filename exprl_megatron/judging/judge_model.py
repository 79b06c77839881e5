"""What a judge's model directory says: how long its context is, and which model it is."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path

from exprl_megatron.errors import UserError

_WHOLE_BYTES = 64 * 2**20
_SAMPLES, _SAMPLE_BYTES = 256, 2**16
_DESCRIPTIONS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "*.jinja")


def model_context(model: str) -> int:
    """Positions that the model in directory `model` was made for; UserError where its config does not say."""
    path = Path(model) / "config.json"
    try:
        return int(json.loads(path.read_text())["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"The judge's context length cannot be read from {path} ({error!r}); "
            "give judge.model a directory whose config.json has max_position_embeddings."
        ) from error


def model_vocabulary(model: str) -> int | None:
    """How many token ids the model in directory `model` has; None where its config does not say."""
    try:
        return int(json.loads((Path(model) / "config.json").read_text())["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@lru_cache(maxsize=16)
def model_identity(model: str) -> str:
    """A hash by content (SHA-256, hex) of config, tokenizer and weights in directory `model`; names of files and
    their times do not matter to it, copies of a model are the same model.

    Of a weights file above 64 MiB it reads the size, the head (names, shapes and places of the tensors) and 256
    pieces of 64 KiB spread evenly: training moves every tensor, and a model of 70B is identified in a second.
    Computed once in a process for each directory.
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
