"""Mathematics: each function turns a row of one data set into a record, or into None where it is filtered out."""

import re

from problem_sets.record import Record, Row, record, text, text_id

_DAPO_FRAME = re.compile(
    r"\ASolve the following math problem step by step\..*?\n\n(?P<problem>.*?)"
    r"\n\nRemember to put your answer on its own line after \"Answer:\"\.?\s*\Z",
    re.DOTALL,
)


def int_hard(row: Row) -> Record | None:
    """InT: hard problems with worked solutions."""
    return _with_solution(row, "solution", "int")


def pope(row: Row) -> Record | None:
    """POPE: problems that a 4B model failed 128 times, with Gemini's solutions that reach the answer."""
    return _with_solution(row, "gemini_solution", "pope")


def math_arena(row: Row, competition: str) -> Record | None:
    """A final-answer competition of MathArena (AIME, HMMT): no references."""
    problem, answer = text(row["problem"]), text(row["answer"])
    if problem is None or answer is None:
        return None
    return record(f"{competition}-{row['problem_idx']}", problem, competition, answer=answer)


def imo_answerbench(row: Row) -> Record | None:
    """IMO-AnswerBench: olympiad problems with short answers, no references."""
    problem, answer = text(row["Problem"]), text(row["Short Answer"])
    if problem is None or answer is None:
        return None
    return record(row["Problem ID"], problem, "imo-answerbench", answer=answer)


def dapo_math(row: Row) -> Record | None:
    """DAPO-Math: problems with integer answers, out of the instructions that frame them; no references."""
    prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][0]["content"]
    framed = _DAPO_FRAME.match(prompt.strip())
    problem = text(framed["problem"] if framed else prompt)
    answer = text(row["reward_model"]["ground_truth"])
    if problem is None or answer is None:
        return None
    return record(f"dapo-math-{row['extra_info']['index']}", problem, "dapo-math", answer=answer)


def openmath(row: Row) -> Record | None:
    r"""OpenMathReasoning: problems whose answer was extracted from the forum, with a model's solution.

    What follows the model's thinking is the reference. It counts as verified where it boxes the expected answer
    to the letter; other rows, also those with another way to write that answer, are left out.
    """
    if row["problem_type"] != "has_answer_extracted" or row["inference_mode"] != "cot":
        return None
    problem, answer = text(row["problem"]), text(row["expected_answer"])
    _, closed, solution = row["generated_solution"].rpartition("</think>")
    if problem is None or answer is None or not closed or f"\\boxed{{{answer}}}" not in solution:
        return None
    return record(text_id("openmath", problem), problem, "openmath", reference=solution, answer=answer)


def _with_solution(row: Row, solution: str, source: str) -> Record | None:
    problem, reference, answer = text(row["problem"]), text(row[solution]), text(row["answer"])
    if problem is None or reference is None or answer is None:
        return None
    return record(text_id(source, problem), problem, source, reference=reference, answer=answer)
