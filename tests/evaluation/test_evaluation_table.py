"""The table of base, primed and final model."""

import io

from rich.console import Console

from exprl_megatron.evaluation.evaluation_table import evaluation_table
from exprl_megatron.evaluation.pass_at_k import estimate_gain, estimate_pass_at_k

BASE = {str(i): [16, i % 2] for i in range(50)}
PRIMED = {str(i): [8, i % 4] for i in range(50)}


def shown(evaluations, ks=(16, 1)):
    console = Console(file=io.StringIO(), width=160)
    console.print(evaluation_table(evaluations, ks, "held-out problems", 0.95))
    return console.file.getvalue()


def bounds(estimate):
    return f"[{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def test_the_table_has_a_row_for_each_model_with_intervals_and_paired_gains():
    text = shown({"base": BASE, "primed": PRIMED})
    estimate, gain = estimate_pass_at_k(list(PRIMED.values()), 1), estimate_gain(BASE, PRIMED, 1)
    assert f"3.1 % {bounds(estimate_pass_at_k(list(BASE.values()), 1))}" in text
    assert f"18.2 % {bounds(estimate)}" in text
    assert f"+15.1 {bounds(gain)}" in text
    assert text.index("pass@1 ") < text.index("pass@16")
    # Eight samples do not reach pass@16.
    assert "50.0 %" in text and " - " in text


def test_the_caption_gives_method_problems_and_seeds():
    text = " ".join(shown({"base": BASE, "primed": PRIMED}).split())
    assert "95% Korn-Graubard interval over 50 problems, 1 seed" in text
    assert "paired by problem, with its 95% paired t interval" in text
    assert "paired" not in shown({"base": BASE})


def test_a_k_that_no_problem_reaches_has_no_column():
    assert "pass@16" not in shown({"primed": PRIMED})
