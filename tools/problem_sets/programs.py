"""Programming: LiveCodeBench's rows, and its tests, which are stored as a pickled string that is never unpickled."""

import base64
import binascii
import json
import pickletools
import zlib

from exprl_megatron.errors import UserError
from problem_sets.record import Record, Row, record, text

LARGEST_TESTS = 2**30
"""Bytes of one problem's decompressed tests."""
_STRING_OPCODES = frozenset(
    {"PROTO", "FRAME", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "MEMOIZE", "PUT", "BINPUT", "STOP"}
    | {"LONG_BINPUT"}
)
READS_INPUT = (
    "Write a Python program that reads standard input and prints to standard output. "
    "Put the whole program into one ```python code block."
)
COMPLETES = "Complete this Python code. Put the whole program into one ```python code block.\n```python\n{code}\n```"


def livecodebench(row: Row, max_tests: int | None = None, reference: str | None = None) -> Record | None:
    """LiveCodeBench: the question, how to answer it, and its public and private tests (the first `max_tests`)."""
    question = text(row["question_content"])
    tests = _tests(row)[:max_tests]
    if question is None or not tests:
        return None
    code = row["starter_code"].strip()
    return record(
        f"livecodebench-{row['question_id']}",
        f"{question}\n\n{COMPLETES.replace('{code}', code) if code else READS_INPUT}",
        "livecodebench",
        reference=reference,
        domain="code",
        tests=tests,
    )


def livecodebench_solution(row: Row, other: Row) -> str | None:
    """Return the solution in `other`, a row of the set of solutions, where it passed all tests.

    Raises UserError where it is the solution of another question than `row`'s.
    """
    info = other["extra_info"]
    if row["question_content"].strip() not in info["question"]:
        raise UserError(
            f"The solution with the index {info['index']} is not to LiveCodeBench's question {row['question_id']}; "
            "the two data sets do not belong together."
        )
    return text(info["solution"]) if info["oracle_verified"] else None


def _tests(row: Row) -> list[dict]:
    function = json.loads(row["metadata"] or "{}").get("func_name")
    cases = json.loads(row["public_test_cases"]) + _private_tests(row["private_test_cases"])
    return [_test(case, function) for case in cases]


def _test(case: dict, function: str | None) -> dict:
    return {"input": case["input"], "output": case["output"]} | ({"function": function} if function else {})


def _private_tests(packed: str) -> list[dict]:
    """Private tests are JSON, or JSON as a string that was pickled, compressed and written in base64."""
    if packed.lstrip().startswith("["):
        return json.loads(packed)
    try:
        unpacker = zlib.decompressobj()
        pickled = unpacker.decompress(base64.b64decode(packed, validate=True), LARGEST_TESTS)
    except (binascii.Error, zlib.error) as error:
        raise UserError(f"A row's private tests are neither JSON nor packed as expected ({error}).") from error
    if unpacker.unconsumed_tail:
        raise UserError(f"A row's private tests unpack to more than {LARGEST_TESTS} bytes; they are not read.")
    return json.loads(pickled_text(pickled))


def pickled_text(pickled: bytes) -> str:
    """Return the string that `pickled` holds, read from its opcodes without running any of them.

    Raises UserError where it holds anything but one string, such as a name that unpickling would call.
    """
    found = []
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name not in _STRING_OPCODES:
                raise UserError(f"A row's private tests hold {opcode.name} and not just a string; they are not read.")
            if isinstance(argument, str):
                found.append(argument)
    except ValueError as error:
        raise UserError(f"A row's private tests are not a pickled string ({error}).") from error
    if len(found) != 1:
        raise UserError(f"A row's private tests hold {len(found)} strings, not one; they are not read.")
    return found[0]
