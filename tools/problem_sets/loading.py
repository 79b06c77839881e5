"""Rows of public data sets: from the Hugging Face hub, or from a copy on this machine."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pyarrow

from exprl_megatron.errors import UserError
from problem_sets.record import Row


def hub_rows(name: str, split: str, config: str | None = None) -> Iterator[Row]:
    """Yield the rows of a data set that the hub (or a directory laid out like its copy) serves as tables."""
    with _told_in_one_sentence(name):
        yield from datasets.load_dataset(name, config, split=split, streaming=True)


def hub_lines(name: str, files: tuple[str, ...]) -> Iterator[Row]:
    """Yield the rows of a data set that the hub (or a directory, its copy) holds as JSON-lines files, in the files'
    order.

    Each line is parsed by itself: some are hundreds of megabytes long, and their fields differ.
    """
    root = name if Path(name).is_dir() else f"hf://datasets/{name}"
    with _told_in_one_sentence(name):
        for file in files:
            lines = datasets.load_dataset("text", data_files=[f"{root}/{file}"], split="train", streaming=True)
            yield from (json.loads(line["text"]) for line in lines if line["text"].strip())


def file_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSON file (a list), a JSON-lines file or a Parquet file."""
    with _told_in_one_sentence(str(path)):
        if path.suffix == ".parquet":
            yield from datasets.load_dataset("parquet", data_files=[str(path)], split="train", streaming=True)
        elif path.suffix == ".json":
            yield from json.loads(path.read_text(encoding="utf-8"))
        else:
            yield from hub_lines(str(path.parent), (path.name,))


@contextmanager
def _told_in_one_sentence(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, pyarrow.ArrowException) as error:
        cause = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"The data set {name} cannot be read ({cause}); correct the name, the split, the connection or the "
            "permission to read it, or give a copy of it with --from."
        ) from error
