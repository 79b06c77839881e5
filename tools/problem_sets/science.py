"""Science: each function turns a row of one data set into a record, or into None where it is filtered out."""

import random
import re
import string
from collections.abc import Sequence

from problem_sets.record import Record, Row, record, text, text_id

MULTIPLE_CHOICE_TASKS = frozenset(
    {
        "general_physics_calculation",
        "reaction_prediction",
        "retrosynthesis",
        "molar_weight_calculation",
        "molecule_structure_prediction",
    }
)
"""Tasks of SciKnowEval that take reasoning; the others ask for recall, safety rules or a property's prediction."""
ENCODED_SUBTASKS = frozenset({"protein_description_generation", "molecule_captioning"})
"""Questions about an amino-acid or SMILES sequence: what is hard there is to read the code."""


def sciknoweval_open_ended(row: Row) -> Record | None:
    """SciKnowEval v1: open-ended physics of levels 4 and 5. The answer is a worked solution, hence the reference."""
    details = row["details"]
    question, answer = text(row["question"]), text(row["answer"])
    wanted = (
        row["type"] == "open-ended-qa"
        and row["domain"] == "Physics"
        and details["level"] in ("L4", "L5")
        and details["subtask"] not in ENCODED_SUBTASKS
    )
    if not wanted or question is None or answer is None:
        return None
    return _open_ended(question, answer)


def sciknoweval_multiple_choice(row: Row) -> Record | None:
    """SciKnowEval v2: multiple choice of level 3, in the tasks that take reasoning; no references."""
    details = row["details"]
    wanted = (
        row["type"] in ("mcq-4-choices", "mcq-2-choices")
        and details["level"] == "L3"
        and details["task"] in MULTIPLE_CHOICE_TASKS
    )
    return _multiple_choice(row["question"], row["choices"], row["answerKey"], None) if wanted else None


def sciknoweval_open_ended_with_solution(row: Row) -> Record | None:
    """Return the open-ended questions with a model's solution that was found to agree with the data set's answer."""
    info = row["extra_info"]
    question, solution = text(info["question"]), text(info["solution"])
    if not info["oracle_verified"] or question is None or solution is None:
        return None
    return _open_ended(question, solution)


def sciknoweval_multiple_choice_with_solution(row: Row) -> Record | None:
    """Return the multiple-choice questions with a model's solution that ends in the right letter."""
    info = row["extra_info"]
    solution = text(info["solution"])
    if not info["oracle_verified"] or solution is None:
        return None
    return _multiple_choice(info["question"], info["choices"], info["answerKey"], solution)


def gpqa_diamond(row: Row, seed: int) -> Record | None:
    """GPQA-diamond: the right choice among the wrong ones in an order that depends on `seed` and the question alone."""
    question, right = text(row["Question"]), text(row["Correct Answer"])
    wrong = [text(row[f"Incorrect Answer {number}"]) for number in (1, 2, 3)]
    if question is None or right is None or None in wrong:
        return None
    identity = f"gpqa-{row['Record ID']}"
    choices = [right, *wrong]
    order = random.Random(f"{seed}/{identity}").sample(range(4), 4)
    return record(
        identity,
        question,
        "gpqa-diamond",
        reference=text(row["Explanation"]),
        answer=string.ascii_uppercase[order.index(0)],
        domain="multiple-choice",
        choices=[choices[place] for place in order],
    )


def olympiadbench_physics(row: Row) -> Record | None:
    """OlympiadBench, open-ended text-only English physics: context and question, all final answers with their unit."""
    if any(row.get(f"image_{number}") is not None for number in range(1, 10)):
        return None
    parts = [text(row["context"]), text(row["question"])]
    answers = [_without_dollars(answer) for answer in row["final_answer"] or () if answer.strip()]
    if parts[1] is None or not answers:
        return None
    unit = text(row["unit"])
    return record(
        f"olympiadbench-physics-{row['id']}",
        "\n\n".join(part for part in parts if part),
        "olympiadbench-physics",
        reference="\n\n".join(row["solution"]),
        answer=", ".join(answers) + (f" {_without_dollars(unit)}" if unit else ""),
        domain="science",
    )


def _open_ended(question: str, reference: str) -> Record:
    source = "sciknoweval-oe"
    return record(text_id(source, question), question, source, reference=reference, domain="science")


def _multiple_choice(question: str, choices: Row, key: str, reference: str | None) -> Record | None:
    labels, texts = choices["label"], [text(choice) for choice in choices["text"]]
    question, key = text(question), text(key)
    if question is None or None in texts or key not in labels or not _lettered(labels, texts):
        return None
    source = "sciknoweval-mcq"
    return record(
        text_id(source, question, *texts),
        question,
        source,
        reference=reference,
        answer=string.ascii_uppercase[labels.index(key)],
        domain="multiple-choice",
        choices=texts,
    )


def _lettered(labels: Sequence[str], texts: Sequence[str | None]) -> bool:
    return 2 <= len(texts) == len(labels) == len(set(labels))


def _without_dollars(answer: str) -> str:
    return re.sub(r"\A\$+|\$+\Z", "", answer.strip()).strip()
