"""The checks of words and types: what they find, and that their counts may only fall."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def tool(monkeypatch):
    """Imports a module of tools/."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    yield __import__
    for name in ("lint_words", "lint_types", "ratchet"):
        sys.modules.pop(name, None)


def words(tool, path: Path, text: str) -> list[tuple[int, str]]:
    path.write_text(text)
    return [(line, word.lower()) for line, word, _ in tool("lint_words").findings(path)]


def test_words_are_refused_in_comments_docstrings_and_messages_but_not_in_names(tool, tmp_path):
    text = '"""Start it anew."""\ntold = {"told": 1}  # what was told\nprint(f"mend {told} soon, whoever reads")\n'
    expected = [(1, "anew"), (2, "told"), (3, "mend"), (3, "whoever")]
    assert sorted(words(tool, tmp_path / "a.py", text)) == expected


def test_words_that_hold_a_refused_one_are_not_refused(tool, tmp_path):
    assert words(tool, tmp_path / "a.py", "# amendment, foretold, what T stands for, understands, silently\n") == []


def test_code_in_pages_is_not_prose(tool, tmp_path):
    page = (
        "Read `told` in [a page](lies.md).\n\n    exprl told\n\n```\ntold\n```\n\nThe weights lie there; it was told.\n"
    )
    assert words(tool, tmp_path / "a.md", page) == [(9, "told")]


def test_comments_of_configs_and_scripts_are_read(tool, tmp_path):
    assert words(tool, tmp_path / "a.yaml", "told: 1\n# Colours that lend weight.\n") == [(2, "colours"), (2, "lend")]


def test_names_of_tests_are_read_as_words(tool, tmp_path):
    assert words(tool, tmp_path / "a.py", "def test_all_are_told_once():\n    told = 1\n") == [(1, "told")]


def test_a_british_spelling_is_refused(tool, tmp_path):
    assert words(tool, tmp_path / "a.py", "# Initialised; serialisation; raised, precise, otherwise\n") == [
        (1, "initialised"),
        (1, "serialisation"),
    ]


def test_errors_of_types_are_counted_by_package(tool):
    output = (
        "exprl_megatron/cli.py:1: error: a\nexprl_megatron/config/a/b.py:2: error: c\nx.py:1: note: d\nFound 2 errors\n"
    )
    assert {name: len(lines) for name, lines in tool("lint_types").by_package(output).items()} == {
        "exprl_megatron": 1,
        "exprl_megatron/config": 1,
    }


def test_a_package_may_not_have_more_than_is_recorded_and_none_without_a_record(tool, tmp_path, capsys):
    record = tmp_path / "ratchet.json"
    record.write_text(json.dumps({"words": {"a": 2}}))
    ratchet = tool("ratchet").Ratchet("words", record)
    assert ratchet.judge({"a": 2}, {"a": ["x", "y"]}, update=False) == 0
    assert ratchet.judge({"a": 3}, {"a": ["x", "y", "z"]}, update=False) == 1
    assert ratchet.judge({"b": 1}, {"b": ["the line"]}, update=False) == 1
    assert "the line\n" in capsys.readouterr().out


def test_the_record_follows_moves_and_what_was_fixed_but_its_sum_never_rises(tool, tmp_path):
    record = tmp_path / "ratchet.json"
    record.write_text(json.dumps({"types": {"x": 1}, "words": {"a": 2, "b": 1}}))
    assert tool("ratchet").Ratchet("words", record).judge({"a": 0, "c": 3}, {}, update=True) == 0
    assert json.loads(record.read_text()) == {"types": {"x": 1}, "words": {"c": 3}}
    assert tool("ratchet").Ratchet("words", record).judge({"a": 1, "c": 3}, {}, update=True) == 1
    assert json.loads(record.read_text())["words"] == {"c": 3}
