"""SECURITY.md names only tests that there are, and for each attempt a test or the reason why there is none."""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "SECURITY.md").read_text()
ROWS = re.findall(r"^\| (\d+)\. (.*?) \| (.*) \|$", TEXT, re.MULTILINE)


@cache
def names_in(path):
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_named_test_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)
    assert len(named) > 60
    assert [f"{path}::{name}" for path, name in named if name not in names_in(path)] == []


def test_each_attempt_has_a_test_or_a_reason():
    assert [int(number) for number, _, _ in ROWS] == list(range(1, 81))
    reasons = ("the same test", "not protected", "not bounded", "not noticed", "none are")
    assert [number for number, _, what in ROWS if "::" not in what and not what.startswith(reasons)] == []


def test_the_readme_leads_to_it():
    assert "(SECURITY.md)" in (ROOT / "README.md").read_text()
