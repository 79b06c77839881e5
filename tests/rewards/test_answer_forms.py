"""How models write answers: each form in math_forms, choice_forms and program_forms.jsonl, and harmless wrappers.

A wrapper around a right answer must leave it right, and one around a wrong answer wrong.
"""

import asyncio
import contextlib
import io
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exprl_megatron.rewards.extraction import extract_answer, extract_program
from exprl_megatron.rewards.math_answer import MathVerifier
from exprl_megatron.rewards.multiple_choice import grade_choice

CITIES = ("London", "Berlin", "Paris", "New York")
FEW = settings(max_examples=120, deadline=None, suppress_health_check=[*HealthCheck])


def _forms(name):
    return [json.loads(line) for line in (Path(__file__).parent / f"{name}_forms.jsonl").read_text().splitlines()]


MATH, CHOICES, PROGRAMS = _forms("math"), _forms("choice"), _forms("program")
AROUND = [
    "{}",
    "\n\n  {}\n",
    "We compute 3 + 4 = 7 first.\n\n{}",
    "# Solution\n\nStep 1: read.\nStep 2: think.\n\n{}",
    "<think>\nPerhaps WRONG? No.\n</think>\n\n{}",
    "Perhaps WRONG? No.\n</think>\n\n{}",
    "<thinking>WRONG</thinking>\n{}",
    "<reasoning>\nWRONG\n</reasoning>\n{}",
    "[THINK]WRONG[/THINK]\n{}",
    "◁think▷WRONG◁/think▷\n{}",
    "<seed:think>WRONG</seed:think>\n{}",
    "<|START_THINKING|>WRONG<|END_THINKING|>\n{}",
    "<|channel|>analysis<|message|>WRONG<|end|><|start|>assistant<|channel|>final<|message|>{}",
    "analysisWRONG is what I thought.assistantfinal\n{}",
    "- First, some words.\n- Then more.\n\n{}",
    "> A quotation.\n\n{}",
    "---\n\n{}",
    "**Solution.** Let us see.\n\n{}",
    "1. One\n2. Two\n\n{}",
    "Hmm, wait. Let me check again. Yes.\n\n{}",
    "{}\n\n<think>WRONG",
    "| a | b |\n|---|---|\n| 1 | 2 |\n\n{}",
    "{}\n\n",
]


def _wrapped(around, thought, text):
    return around.replace("{}", text, 1).replace("WRONG", thought)


@pytest.fixture(scope="module")
def verifier():
    with MathVerifier() as verifier:
        yield verifier


@pytest.fixture(scope="module")
def graded(verifier):
    async def all_of_them():
        return await asyncio.gather(*(verifier.verify(form["gold"], form["text"], 30.0) for form in MATH))

    return dict(zip([(form["gold"], form["text"]) for form in MATH], asyncio.run(all_of_them()), strict=True))


@pytest.mark.parametrize("form", MATH, ids=[f"{form['gold']} {form['text'][-30:]}" for form in MATH])
def test_every_form_of_a_mathematical_answer(graded, form):
    assert graded[form["gold"], form["text"]].value == float(form["right"])


def _right(verifier, gold, text):
    return asyncio.run(verifier.verify(gold, text, 30.0)).value


STATED = [
    r"\boxed{{{}}}",
    r"$\boxed{{{}}}$.",
    r"\[\boxed{{{}}}\]",
    "#### {}",
    r"**Final Answer:** $\boxed{{{}}}$",
    "The answer is {}.",
]
GOLDS = [
    "5",
    "-3",
    "0.25",
    "1200",
    r"\frac{3}{7}",
    r"2\sqrt{3}",
    "x^2+1",
    "(1,2)",
    "1,2,3",
    "12:30",
    "204_5",
    "yes",
    "1e-07",
]
CLOTHES = ["{}", " {} ", "${}$", r"\mathbf{{{}}}", r"{}\,", r"\displaystyle {}", "**{}**", r"\text{{{}}}", "{}."]


@FEW
@given(st.sampled_from(AROUND), st.sampled_from(STATED), st.sampled_from(CLOTHES), st.sampled_from(GOLDS), st.data())
def test_harmless_text_around_a_mathematical_answer(verifier, around, stated, clothes, gold, data):
    # Mathematics is not set within \text, nor a relation in a sentence.
    if clothes == r"\text{{{}}}" and ("\\" in gold or "^" in gold):
        clothes = "{}"
    wrong = data.draw(st.sampled_from([other for other in GOLDS if other != gold]))
    for answer, thought, right in ((gold, wrong, 1.0), (wrong, gold, 0.0)):
        text = _wrapped(around, rf"\boxed{{{thought}}}", stated.format(clothes.format(answer)))
        assert _right(verifier, gold, text) == right, text


@pytest.mark.parametrize("form", CHOICES, ids=[form["text"][:40] for form in CHOICES])
def test_every_form_of_a_choice(form):
    assert grade_choice("C", CITIES, form["text"]).value == float(form["right"])


def _without_thinking(forms, right):
    texts = [form["text"] for form in forms if form["right"] is right]
    return [text for text in texts if not any(tag in text for tag in ("think", "channel", "analysis", "<pre>"))]


CHOICE_STATED, CHOICE_WRONG = _without_thinking(CHOICES, True), _without_thinking(CHOICES, False)


@settings(max_examples=800, deadline=None)
@given(st.sampled_from(AROUND), st.sampled_from(CHOICE_STATED), st.sampled_from(CHOICE_WRONG))
def test_harmless_text_around_a_choice(around, right, wrong):
    assert grade_choice("C", CITIES, _wrapped(around, r"\boxed{A}", right)).value == 1.0
    assert grade_choice("C", CITIES, _wrapped(around, r"\boxed{C}", wrong)).value == 0.0


def _prints(program):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(program, {"__name__": "__main__"})
    return output.getvalue()


@pytest.mark.parametrize("form", PROGRAMS, ids=[form["text"][:40] for form in PROGRAMS])
def test_every_form_of_a_program(form):
    program = extract_program(form["text"])
    if form["right"]:
        assert _prints(program) == "1\n"
    else:
        assert program is None


PROGRAM_STATED = [text for text in _without_thinking(PROGRAMS, True) if "print(1)" in text]


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(AROUND), st.sampled_from(PROGRAM_STATED))
def test_harmless_text_around_a_program(around, stated):
    other = "\n```python\nprint(2)\n```\n"
    for program, printed in ((stated, "1\n"), (stated.replace("print(1)", "print(3)"), "3\n")):
        assert _prints(extract_program(_wrapped(around, other, program))) == printed


REPEATED = [
    r"\boxed{",
    r"\boxed{1} and ",
    "the answer is ",
    "####",
    "(",
    "`",
    "```python\n",
    "<pre><code>",
    "\n",
    r"\text{",
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("piece", REPEATED)
def test_a_trace_that_got_stuck_is_read_to_its_end(piece):
    text = piece * (200_000 // len(piece))
    assert grade_choice("A", CITIES, text).value == 0.0
    extract_answer(text)
    extract_program(text)
