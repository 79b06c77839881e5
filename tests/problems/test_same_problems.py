"""A function that yields other problems at each call is refused before anything is sampled from them."""

import sys
import textwrap

import pytest

from exprl_megatron.config.problems import ProblemsConfig
from exprl_megatron.launch.input_hashes import _problems
from exprl_megatron.plugins.failures import PluginError
from exprl_megatron.plugins.loading import load_plugin
from exprl_megatron.problems.contents import expect_problems
from exprl_megatron.problems.sources import first_problem, load_problems

BODY = """
calls = []
def load(split):
    calls.append(split)
    numbers = range(3)
    for number in CHANGED:
        yield {"id": number, "problem": f"What is {number}?", "reference": "REFERENCE"}
"""
CONFIG = ProblemsConfig(source="mine_changing:load")


@pytest.fixture
def started(tmp_path, monkeypatch):
    """`started(expression)`: a process of a run whose launcher has read the problems of these numbers."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def start(numbers: str, reference: str = "It is so."):
        load_plugin.cache_clear()
        _problems.cache_clear()
        body = textwrap.dedent(BODY).replace("CHANGED", numbers).replace('"REFERENCE"', reference)
        (tmp_path / "mine_changing.py").write_text(body)
        expect_problems({CONFIG: _problems(CONFIG)})

    yield start
    expect_problems({})
    sys.modules.pop("mine_changing", None)
    load_plugin.cache_clear()
    _problems.cache_clear()


def test_a_source_that_yields_the_same_is_read_as_often_as_is_needed(started):
    started("numbers", '"It is so."')
    assert [len(load_problems(CONFIG)) for _ in range(3)] == [3, 3, 3]


@pytest.mark.parametrize(
    ("numbers", "reference"),
    [
        ("numbers[:: (-1) ** len(calls)]", '"It is so."'),
        ("range(len(calls))", '"It is so."'),
        ("numbers", 'f"It is {len(calls)}."'),
    ],
    ids=["order", "number", "reference"],
)
def test_a_source_that_yields_something_else_is_refused_with_the_remedy(started, numbers, reference):
    started(numbers, reference)
    with pytest.raises(PluginError, match=r"mine_changing:load yielded other problems, .* yield the same ones at each"):
        load_problems(CONFIG)


def test_a_part_of_the_problems_is_not_compared_with_all(started):
    started("numbers", '"It is so."')
    assert first_problem(CONFIG).id == "0"
