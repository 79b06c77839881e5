"""Hashes of problems, and the check that a function of the user yields the same ones in every process of a run."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping

import xxhash

from exprl_megatron.config.problems import ProblemsConfig
from exprl_megatron.plugins.failures import PluginError
from exprl_megatron.problems.problem import Problem, Reference

_expected: dict[ProblemsConfig, str] = {}


def hash_problems(problems: Iterable[Problem]) -> str:
    """Hash all fields of the problems, in their order (XXH3, hex)."""
    digest = xxhash.xxh3_128()
    for problem in problems:
        digest.update(_text(_fields(problem)).encode(errors="surrogatepass"))
    return digest.hexdigest()


def hash_value(value: object) -> str:
    """Hash the JSON of a value (SHA-256, hex)."""
    return hashlib.sha256(_text(value).encode(errors="surrogatepass")).hexdigest()


def expect_problems(hashes: Mapping[ProblemsConfig, str]) -> None:
    """Compare, from now on in this process, what functions of the user yield with these results of `hash_problems`."""
    _expected.clear()
    _expected.update(hashes)


def check_expected(config: ProblemsConfig, problems: Iterable[Problem]) -> None:
    """Check the problems of a source that is a function of the user.

    Raises:
        PluginError: they are not those that this process expects.
    """
    if config in _expected and hash_problems(problems) != _expected[config]:
        raise PluginError(
            f"problems.source: {config.source} yielded other problems, or in another order, than when the run's inputs "
            "were checked, so that the run could not be resumed; yield the same ones at each call and in each "
            "process (a fixed seed; no order of a set)."
        )


def _fields(problem: Problem) -> list:
    """Return every field, with a hash in place of the reference."""
    values = (getattr(problem, field.name) for field in dataclasses.fields(problem))
    return [hash_value(value.for_training()) if isinstance(value, Reference) else value for value in values]


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=dataclasses.asdict)
