"""docs/status.md: every path has a row, and every claim names a test of the suite that it claims."""

import ast
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from pydantic import BaseModel
from typer.main import get_command

from exprl_megatron.config.policy import Layout
from exprl_megatron.config.run import RunConfig
from exprl_megatron.models.architecture import FAMILIES

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
PAGE = (ROOT / "docs" / "status.md").read_text(encoding="utf-8")
LEVELS = ("CPU", "NCCL-like", "meta", "read", "never")
SIZES = (
    "policy.precision.first_last_bf16",
    "policy.moe_aux_loss",
    "policy.router_replay",
    "stages.optimizer.offload",
    "stages.max_staleness",
    "server.tp",
    "server.count",
    "server.mem_fraction_static",
    "judge.endpoints",
)
"""Settings that are no choice of names, but open a path of their own."""


@dataclass(frozen=True)
class Row:
    """A line of one of the page's tables."""

    paths: frozenset[str]
    levels: frozenset[str]
    shown_by: tuple[str, ...]
    gpu: tuple[str, ...]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def paths_of(cell: str) -> frozenset[str]:
    """`a.b: x`, `y` are the values x and y of a.b; `c.d` is a setting as a whole."""
    found, setting = set(), ""
    for span in code(cell):
        name, colon, value = span.partition(": ")
        if colon:
            setting = name
        found.add(f"{setting}: {value}" if colon else span if "." in span or " " in span else f"{setting}: {span}")
    return frozenset(found or {cell.strip()})


def rows() -> list[Row]:
    found = []
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("| ") or cells[0] in ("path", "level") or cells[0].strip("`") in LEVELS:
            continue
        gpu = tuple(code(cells[3])) if len(cells) > 3 else ()
        levels = frozenset(span for span in code(cells[1]) if span in LEVELS)
        found.append(Row(paths_of(cells[0]), levels, tuple(code(cells[2])), gpu))
    return found


def choices(annotation) -> tuple[list, list[type[BaseModel]]]:
    """The names to choose from in a field of this type, and the configs within it."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation)), []
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [], [annotation]
    found, within = [], []
    for argument in get_args(annotation):
        names, models = choices(argument)
        found, within = found + names, within + models
    return found, within


def settings(model: type[BaseModel], above: str = "") -> set[str]:
    """Every value of every choice in the config; of a switch and of a mapping the setting itself."""
    found = set()
    for name, field in model.model_fields.items():
        path, annotation = above + name, field.annotation
        names, within = choices(annotation)
        if get_origin(annotation) is dict or bool in (annotation, *get_args(annotation)):
            found.add(path)
        elif names:
            found |= {f"{path}: {value}" for value in names}
        for config in within:
            found |= settings(config, f"{path}.")
    return found


def all_paths() -> set[str]:
    from exprl_megatron.cli import ServerKind, ServersFrom, app
    from recipes.catalog import EXECUTORS, MODELS

    stages = re.findall(r"^FROM \S+ AS (\w+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    bases = re.findall(r"^FROM (\w+) AS|from=(\w+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    images = set(stages) - {name for pair in bases for name in pair}
    import convert_checkpoint

    return (
        settings(RunConfig)
        | set(SIZES)
        | {f"policy.layout.{name}" for name in Layout.model_fields}
        | {f"family: {family}" for family in FAMILIES.values()}
        | {f"server kind: {kind}" for kind in ServerKind}
        | {f"--servers: {kind}" for kind in ServersFrom}
        | {f"exprl {name}" for name in get_command(app).commands}
        | {f"convert_checkpoint.py {name}" for name in get_command(convert_checkpoint.app).commands}
        | {f"run.executor: {executor.__name__}" for executor in EXECUTORS}
        | {f"recipe: {name}" for name in MODELS}
        | {f"image: {name}" for name in images}
    )


def test_every_path_has_a_row_and_only_one():
    listed = [path for row in rows() for path in row.paths]
    assert sorted(all_paths() - set(listed)) == [], "docs/status.md lacks these"
    assert sorted({path for path in listed if listed.count(path) > 1}) == []


def test_no_row_is_about_what_is_gone():
    settled = {path for row in rows() for path in row.paths if re.match(r"[\w-]+[.: ]", path)}
    unknown = {path for path in settled - all_paths() if not path.startswith(("a ", "an ", "jobs "))}
    assert sorted(unknown) == []


@cache
def named_tests(file: str) -> dict[str, str]:
    """The tests in a file with their source, and before it the file's own marks."""
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    assigned = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign)]
    marks = [source for source in assigned if source.startswith("pytestmark")]
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return {node.name: "\n".join([*marks, ast.unparse(node)]) for node in functions}


def suites_of(reference: str) -> set[str]:
    """What a test that exists is evidence of."""
    file, _, name = reference.partition("::")
    assert (TESTS / file).is_file() and name in named_tests(file), f"there is no {reference}"
    source = named_tests(file)[name]
    if "mark.gpu" in source:
        return {"GPU"}
    assert "mark.chaos" not in source, f"{reference} is not part of make test"
    if file.startswith("te/"):
        return {"meta"}
    # Some run over gloo and over the backend, by the parameters of a fixture.
    both = "collectives" in source
    over_backend = "under_nccl" in (TESTS / file).read_text(encoding="utf-8") and "nccl" in source.lower()
    return {"CPU", "NCCL-like"} if both else {"NCCL-like"} if over_backend else {"CPU"}


@pytest.mark.parametrize("row", rows(), ids=lambda row: min(row.paths))
def test_what_a_row_claims_is_shown_by_tests_of_that_suite(row):
    suites = [suites_of(reference) for reference in row.shown_by]
    assert row.levels, "it says nothing"
    assert all(found & row.levels for found in suites), "a test shows nothing of what is claimed"
    shown = set().union(*suites)
    assert row.levels - {"read", "never"} <= shown
    assert all(suites_of(reference) == {"GPU"} for reference in row.gpu)


@pytest.mark.slow
def test_the_tests_that_are_named_are_collected():
    """Which marks decide the suite is read in their source; pytest itself says here that it finds them."""
    named = {reference for row in rows() for reference in (*row.gpu, *row.shown_by)}
    # Those in te/ are collected in an environment of their own.
    named = {reference for reference in named if not reference.startswith("te/")}
    files = sorted({f"tests/{reference.partition('::')[0]}" for reference in named})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    collected = {line.partition("[")[0].removeprefix("tests/") for line in done.stdout.splitlines()}
    assert sorted(named - collected) == [], done.stdout[-2000:]


def test_the_page_is_linked_from_the_readme_s_first_screen():
    first_screen = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:25]
    assert any("(docs/status.md)" in line for line in first_screen)
