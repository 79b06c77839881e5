"""A function of the user as a problem source: its records are checked like those of a file, its faults are named."""

import sys
import textwrap

import pytest

from exprl_megatron.config.problems import ProblemsConfig
from exprl_megatron.errors import UserError
from exprl_megatron.plugins.failures import PluginError
from exprl_megatron.plugins.loading import load_plugin
from exprl_megatron.problems.sources import load_problems


@pytest.fixture
def load(tmp_path, monkeypatch):
    """`load(body, **config)`: the problems of the function `load` in a module with this body."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def loaded(body: str, **config):
        load_plugin.cache_clear()
        sys.modules.pop("mine_source", None)
        (tmp_path / "mine_source.py").write_text(textwrap.dedent(body))
        return load_problems(ProblemsConfig(source="mine_source:load", **config))

    yield loaded
    sys.modules.pop("mine_source", None)
    load_plugin.cache_clear()


GOOD = """
def load(split):
    for number in range(3):
        yield {"id": number, "question": f"{split} {number}?", "reference": f"It is {number}."}
"""


def test_records_are_those_of_a_file(load):
    problems = load(GOOD, split="dev", fields={"problem": "question"})
    assert [(p.id, p.text, p.reference.for_judge()) for p in problems][1] == ("1", "dev 1?", "It is 1.")
    assert len(problems) == 3


def test_no_more_than_the_limit_is_read(load):
    body = """
        import itertools
        def load(split):
            for number in itertools.count():
                assert number < 2, "read too far"
                yield {"id": number, "problem": "q"}
    """
    assert len(load(body, limit=2)) == 2


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (GOOD, r"load: in all 3 records the field 'problem' is missing .* set problems.fields.problem=question"),
        (
            "def load(split): return [{'id': 'a', 'problem': 'q'}] * 2",
            r"record 2: the id 'a' also occurs at .* record 1",
        ),
        ("def load(split): return []", r"The problem source mine_source:load is empty"),
    ],
)
def test_faults_of_records_are_those_of_a_file(load, body, sentence):
    with pytest.raises(UserError, match=sentence):
        load(body)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("def load(): return []", r"takes other arguments than \(split\)"),
        ("def load(split): return 'a.jsonl'", r"returned a str instead of an iterable of records"),
        ("def load(split): return {'id': 'a'}", r"returned a dict instead of an iterable of records"),
        ("def load(split): return ['a']", r"yielded a str as record 1 instead of a mapping of fields"),
        ("def load(split):\n    yield {'id': 'a', 'problem': 'q'}\n    yield {}[1]", "line 3, in load: KeyError: 1"),
        ("def load(split):\n    raise OSError('no route')", r"py, line 2, in load: OSError: no route"),
        ("class L:\n    def __iter__(self): raise OSError('a')\ndef load(split): return L()", "2, in __iter__: O"),
        (
            "from collections import UserDict\nclass M(UserDict):\n    def __iter__(self): raise OSError('a')\n"
            "def load(split): return [M(id='a')]",
            "line 3, in __iter__: OSError: a",
        ),
        ("class P(BaseException): pass\ndef load(split):\n    yield {}\n    raise P", "line 4"),
    ],
)  # fmt: skip
def test_a_source_that_fails_is_named_with_file_and_line(load, body, sentence):
    with pytest.raises(PluginError, match=sentence) as failed:
        load(body)
    assert "problems.source: mine_source:load" in str(failed.value) and "mine_source.py" in str(failed.value)


def test_records_that_never_end_are_refused_with_the_remedy(load, monkeypatch):
    monkeypatch.setattr("exprl_megatron.problems.sources.MAX_RECORDS", 3)
    body = "import itertools\ndef load(split): return ({'id': n, 'problem': 'q'} for n in itertools.count())"
    with pytest.raises(PluginError, match=r"mine_source.py, line 2\) yielded more than 3 records; set problems.limit"):
        load(body)
    assert len(load(body, limit=5)) == 5


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ("{'id': numpy.int64(3), 'problem': numpy.str_('q'), 'answer': numpy.float32(0.1)}", ("3", "q", "0.1")),
        ("{'id': numpy.float64(3), 'problem': 'q', 'answer': 1e-5}", ("3.0", "q", "0.00001")),
    ],
)
def test_numbers_and_text_of_numpy_are_read_as_those_of_python(load, record, text):
    (problem,) = load(f"import numpy\ndef load(split): return [{record}]")
    assert (problem.id, problem.text, problem.answer) == text
    assert {type(problem.id), type(problem.text), type(problem.answer)} == {str}


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ("{'id': 10**5000, 'problem': 'q'}", "the field 'id' is a number that has no decimal form; write it as text"),
        ("{1: 2, None: 3, 'id': 4}", r"'problem' is missing \(the record has: 1, None, id\)"),
        ("{}", r"'id' is missing \(the record has: no field\)"),
        ("{str(n): n for n in range(5000)}", r"the record has: 0, 1, .*, 19, \.\.\.\)"),
        ("{'id': 1, 'problem': 'q', 'domain': numpy.zeros(2)}", r"'domain' is array\(\[0., 0.\]\); use one of math"),
        ("{'id': 1, 'problem': 'q', 'domain': 'x' * 10**6}", r"'domain' is 'x{56}\.\.\.; use one of math"),
        ("{'id': 1, 'problem': 'q', 'choices': R()}", "'choices' is a R; write a list"),
    ],
)
def test_a_record_that_is_not_a_problem_is_a_short_sentence(load, record, sentence):
    body = "import numpy\nclass R:\n    def __repr__(self): raise KeyError\ndef load(split): return [" + record + "]"
    with pytest.raises(UserError, match=sentence) as caught:
        load(body)
    assert len(str(caught.value)) < 1000


def test_a_file_of_that_name_is_a_file(load, tmp_path):
    (tmp_path / "mine_source:load").write_text("")
    with pytest.raises(UserError, match=r"neither \.jsonl nor \.parquet"):
        load(GOOD)
