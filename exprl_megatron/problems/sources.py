"""Reads problems from JSON lines, Parquet, a directory of either, the Hugging Face hub, or a function of the user."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from exprl_megatron.config.plugin_path import is_plugin
from exprl_megatron.config.problems import ProblemsConfig
from exprl_megatron.errors import UserError
from exprl_megatron.plugins.calling import Plugin, described
from exprl_megatron.plugins.long_calls import says_what_takes_long
from exprl_megatron.problems.contents import check_expected
from exprl_megatron.problems.problem import Problem
from exprl_megatron.problems.records import group_faults, parse_problem, parse_record, parse_records, raise_faults

JSON_LINES = (".jsonl", ".json")
PARQUET = (".parquet",)
_BATCH_ROWS = 1024
MAX_RECORDS = 2_000_000
"""Maximum number of records that are read from a function of the user without a limit in the config."""
MAX_FAULTS = 10_000
"""A source with so many is not read to its end."""
SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")

_END = object()
_cache: ContextVar[dict[ProblemsConfig, list[Problem]] | None] = ContextVar("_cache", default=None)
"""The problems that were read within `cached_sources`."""
SourceRow = tuple[str, dict | str]
"""The place of a record, and the record or a sentence about its fault."""


def load_problems(config: ProblemsConfig) -> list[Problem]:
    """Read at most `config.limit` problems of `config.source`, in the order of the source.

    All JSON-lines and Parquet files of a directory are read, sorted by path, except those named after another split
    than `config.split`.

    Raises:
        UserError: the source cannot be read or is empty, a line or a field is faulty, or an id occurs twice; one
            sentence for each of the first ten different faults.
        PluginError: the user's function failed, yielded something other than a record, or other problems than
            `expect_problems` names.
    """
    cache = _cache.get()
    if cache is None:
        return _load(config)
    if config not in cache:
        cache[config] = _load(config)
    return list(cache[config])


def _load(config: ProblemsConfig) -> list[Problem]:
    problems = [problem for problem, _ in load_records(config)]
    if is_custom_source(config.source):
        check_expected(config, problems)
    return problems


def first_problem(config: ProblemsConfig) -> Problem:
    """Read the first problem of the source; within `cached_sources` all of them are read.

    Raises:
        UserError: see `load_problems`.
        PluginError: see `load_problems`.
    """
    if _cache.get() is not None:
        return load_problems(config)[0]
    return load_problems(config.model_copy(update={"limit": 1}))[0]


@contextmanager
def cached_sources() -> Iterator[None]:
    """Cache the problems that `load_problems` reads in this thread until the end of the context.

    A nested context uses the cache of the outer one.
    """
    if _cache.get() is not None:
        yield
        return
    token = _cache.set({})
    try:
        yield
    finally:
        _cache.reset(token)


def load_records(config: ProblemsConfig) -> list[tuple[Problem, dict]]:
    """Read the problems of `load_problems`, each with its record.

    Raises:
        UserError: see `load_problems`.
        PluginError: see `load_problems`.
    """
    found: list[tuple[Problem, dict[str, Any]]] = []
    faults, count = [], 0
    seen: dict[str, str] = {}
    with says_what_takes_long(lambda: f"reading problems from {config.source}: {count} records so far ..."):
        for place, record in itertools.islice(_rows(config), config.limit):
            count += 1
            if isinstance(record, str):
                faults.append((place, record))
            elif isinstance(problem := parse_problem(record, config.fields, config.domains), list):
                faults += [(place, sentence) for sentence in problem]
            elif problem.id in seen:
                faults.append((place, f"the id {problem.id!r} also occurs at {seen[problem.id]}; make the ids differ."))
            else:
                seen[problem.id] = place
                found.append((problem, record))
            if len(faults) >= MAX_FAULTS:
                break  # of a source that never ends
    raise_faults(group_faults(faults, config.source, count))
    if not found:
        raise UserError(f"The problem source {config.source} is empty; give one with at least one problem.")
    return found


def is_custom_source(source: str) -> bool:
    """Return whether `problems.source` names a function of the user, and not an existing file."""
    return is_plugin(source) and not Path(source).expanduser().exists()


def _rows(config: ProblemsConfig) -> Iterator[SourceRow]:
    path = Path(config.source).expanduser()
    if path.is_dir():
        return itertools.chain.from_iterable(_file_rows(file) for file in _files(path, config.split))
    if path.is_file():
        return _file_rows(path)
    if is_custom_source(config.source):
        return _custom_rows(config)
    if path.suffix in JSON_LINES + PARQUET or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", config.source):
        raise UserError(f"There is no problem file {config.source}; correct the path.")
    return _hub_rows(config)


def _files(directory: Path, split: str) -> list[Path]:
    files = sorted(f for f in directory.rglob("*") if f.suffix in JSON_LINES + PARQUET and f.is_file())
    if not files:
        raise UserError(f"The directory {directory} holds no .jsonl and no .parquet file; give one that does.")
    kept = [f for f in files if _in_split(f.relative_to(directory).as_posix(), split)]
    if not kept:
        raise UserError(f"The directory {directory} has no file for the split {split!r}; set problems.split.")
    return kept


def _in_split(path: str, split: str) -> bool:
    """Return whether a file belongs to the split: its path names this split, or none."""
    named = set(re.findall(r"[a-z]+", path.lower())) & {*SPLIT_NAMES, split.lower()}
    return not named or split.lower() in named


def _file_rows(path: Path) -> Iterator[SourceRow]:
    if path.suffix in JSON_LINES:
        return json_rows(path, "problem file")
    if path.suffix in PARQUET:
        return _parquet_rows(path)
    raise UserError(f"The problem file {path} is neither .jsonl nor .parquet; convert it, or correct its name.")


def json_rows(path: Path, what: str) -> Iterator[SourceRow]:
    """Yield the records of a file: one for each line, or those of a JSON list where the file starts with a bracket.

    A byte-order mark is ignored. `what` names the kind of file in errors.

    Raises:
        UserError: the file is not UTF-8.
    """
    # The package `datasets` treats paths as patterns, does not name the line of a fault, and needs answers of one type.
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            first = next((line for line in file if line.strip()), "")
            file.seek(0)
            if first.lstrip("\ufeff \t\r\n").startswith("["):
                yield from _json_list(path, file.read().lstrip("\ufeff"))
                return
            for number, line in enumerate(file, start=1):
                line = line.lstrip("\ufeff") if number == 1 else line
                if line.strip():
                    yield f"{path} line {number}", parse_record(line)
    except UnicodeDecodeError as error:
        raise UserError(f"The {what} {path} is not UTF-8 text ({error}); convert it.") from error


def _json_list(path: Path, text: str) -> Iterator[SourceRow]:
    records = parse_records(text)
    if isinstance(records, str):
        yield str(path), records
        return
    for number, record in enumerate(records, start=1):
        yield f"{path} item {number}", record


def _parquet_rows(path: Path) -> Iterator[SourceRow]:
    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH_ROWS):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"The problem file {path} cannot be read as Parquet ({error}); write it again.") from error


def _custom_rows(config: ProblemsConfig) -> Iterator[SourceRow]:
    """Yield the records of the user's function; raises PluginError where it fails or does not return an iterable."""
    plugin = Plugin.load("problems.source", config.source)
    plugin.check_arguments(("split",))
    records = plugin(config.split)
    if not isinstance(records, Iterable) or isinstance(records, str | Mapping):
        raise plugin.failure(f"returned {described(records)} instead of an iterable of records")
    iterator = plugin.guarded(lambda: iter(records))
    for number in itertools.count(1):
        if number > MAX_RECORDS and config.limit is None:
            raise plugin.failure(
                f"yielded more than {MAX_RECORDS} records; set problems.limit if it has more, or never ends"
            )
        # A generator raises its exceptions here, and not where it is called.
        record = plugin.guarded(lambda: next(iterator, _END))
        if record is _END:
            return
        if not isinstance(record, Mapping):
            raise plugin.failure(f"yielded {described(record)} as record {number} instead of a mapping of fields")
        yield f"{config.source} record {number}", plugin.guarded(partial(dict, record))


def _hub_rows(config: ProblemsConfig) -> Iterator[SourceRow]:
    # Imported only here: it imports pandas and other packages, which takes half a second.
    import datasets

    try:
        rows = datasets.load_dataset(config.source, split=config.split, streaming=True)
        for number, record in enumerate(rows, start=1):
            yield f"{config.source} row {number}", record
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"The problem source {config.source} is not a local file and cannot be read from the Hugging Face hub "
            f"({_one_line(error)}); correct the name, the split {config.split!r} or the connection."
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
