"""Converts records of a source to problems, and describes what is wrong with their fields."""

import itertools
import json
import math
import string
from collections.abc import Sequence
from decimal import Decimal
from numbers import Integral, Real
from typing import Any, get_args

from exprl_megatron.config.problems import BuiltInDomain, Domain, FieldNames
from exprl_megatron.errors import UserError
from exprl_megatron.problems.problem import CodeTest, Problem, Reference
from exprl_megatron.utils.required import required

DOMAINS: tuple[str, ...] = get_args(BuiltInDomain)
MAX_SHOWN_FAULTS = 10
MAX_TEXT_CHARS = 4_000_000
"""Longer than the context of any model; such a text would be tokenized for minutes before it is refused."""
OPTIONAL_TEXTS = ("reference", "answer", "source")
COMMON_NAMES = {
    "id": ("uid", "uuid", "qid", "_id", "idx", "index", "question_id", "problem_id", "unique_id"),
    "problem": ("question", "prompt", "query", "input", "instruction", "text", "Problem", "Question"),
}
"""Common names in data sets of the fields that a problem needs; the first that a record has is suggested."""
NUMERIC_FIELDS = ("id", "answer")
"""Fields that may be numbers in a source; they are converted to text."""


def parse_record(line: str) -> dict[str, Any] | str:
    """Parse a line of JSON; return the record, or a sentence about the fault of the line."""
    try:
        record = json.loads(line, object_pairs_hook=_object)
    except _DuplicateKey as error:
        return str(error)
    except (ValueError, RecursionError) as error:
        return f"this is not JSON ({error}); fix or delete the line."
    return _record(record)


def parse_records(text: str) -> list[dict[str, Any] | str] | str:
    """Parse a JSON list; return its records, a sentence in place of each faulty one, or a sentence about the list."""
    try:
        records = json.loads(text, object_pairs_hook=_object)
    except _DuplicateKey as error:
        return str(error)
    except (ValueError, RecursionError) as error:
        return f"this is not a JSON list ({error}); fix it, or write one object a line."
    return [_record(record) for record in records]


class _DuplicateKey(Exception):
    """A JSON object has a key twice; the json module would silently use the last one."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _DuplicateKey(f"the key {twice!r} occurs twice in one object; remove one of them.")
    return record


def _record(record: Any) -> dict[str, Any] | str:
    if isinstance(record, dict):
        return record
    return f"this is a JSON {type(record).__name__}, not an object; write {{...}} with named fields."


def raise_faults(faults: Sequence[str]) -> None:
    """Report faults as one error.

    Raises:
        UserError: there are faults; the message has the first ten of the sentences.
    """
    if faults:
        rest = len(faults) - MAX_SHOWN_FAULTS
        raise UserError(
            "\n".join([*faults[:MAX_SHOWN_FAULTS], *([f"... and {rest} more faults."] if rest > 0 else [])])
        )


def group_faults(faults: Sequence[tuple[str, str]], source: str, count: int) -> list[str]:
    """Return one sentence for each different fault of `count` records, with its place or the number of such records.

    `faults` are pairs of a place and a sentence.
    """
    places: dict[str, list[str]] = {}
    for place, sentence in faults:
        places.setdefault(sentence, []).append(place)
    return [_of_all(where, sentence, source, count) for sentence, where in places.items()]


def _of_all(places: Sequence[str], sentence: str, source: str, count: int) -> str:
    if len(places) == 1:
        return f"{places[0]}: {sentence}"
    if len(places) == count:
        return f"{source}: in all {count} records {sentence}"
    first = places[0].removeprefix(source).strip()
    return f"{source}: in {len(places)} of {count} records, the first at {first}, {sentence}"


def parse_problem(record: dict[str, Any], fields: FieldNames, domains: Sequence[str] = ()) -> Problem | list[str]:
    """Convert a record to a Problem, or return a sentence for each fault of the record.

    Only the id and the problem are required; any other field may be missing or null. `choices` is a list of text,
    `tests` a list of {"input": text, "output": text} with an optional "function". `domains` are allowed in addition
    to the built-in ones.
    """
    reader = _Reader(record, fields, domains)
    texts = {role: reader.text(role, needed=role in ("id", "problem")) for role in ("id", "problem", *OPTIONAL_TEXTS)}
    domain = reader.domain()
    choices, tests = reader.choices(), reader.tests()
    if not reader.faults:
        reader.faults += _contradictions(domain, texts["reference"], texts["answer"], choices, tests)
    if reader.faults:
        return reader.faults
    return Problem(
        id=required(texts["id"], "the id"),
        text=required(texts["problem"], "the problem"),
        reference=None if texts["reference"] is None else Reference(texts["reference"]),
        answer=texts["answer"],
        domain=domain,
        choices=choices,
        tests=tests,
        source=texts["source"] or "",
    )


class _Reader:
    """Reads the fields of one record and collects their faults."""

    def __init__(self, record: dict[str, Any], fields: FieldNames, domains: Sequence[str]):
        self._record = record
        self._domains = (*DOMAINS, *domains)
        self._fields = fields
        self.faults: list[str] = []

    def text(self, role: str, *, needed: bool) -> str | None:
        name, value = self._field(role)
        if role in NUMERIC_FIELDS and isinstance(value, Real) and not isinstance(value, bool):
            return self._number(name, value)
        if value is None:
            if needed:
                known = _shown_keys(self._record)
                near = next((other for other in COMMON_NAMES[role] if other in self._record), None)
                remedy = f"set problems.fields.{role}={near}" if near else f"add it or set problems.fields.{role}"
                self.faults.append(f"the field {name!r} is missing (the record has: {known}); {remedy}.")
        elif not isinstance(value, str):
            self.faults.append(f"the field {name!r} is a {type(value).__name__}, not text; write it as text.")
        elif not value.strip():
            self.faults.append(
                f"the field {name!r} is empty; fill it or leave the {'problem' if needed else 'field'} out."
            )
        elif len(value) > MAX_TEXT_CHARS:
            self.faults.append(
                f"the field {name!r} has {len(value)} characters, more than {MAX_TEXT_CHARS}; shorten it, or leave the "
                "problem out."
            )
        elif (fault := encoding_fault(value)) is not None:
            self.faults.append(f"the field {name!r} {fault}")
        else:
            return str.__str__(value)  # not a subclass such as numpy.str_, which not every library takes for text
        return None

    def _number(self, name: str, value: Real) -> str | None:
        """Format a number without an exponent: 0.00001 and not 1e-05."""
        if not isinstance(value, Integral) and not math.isfinite(value):
            self.faults.append(f"the field {name!r} is {value}, not a number; write the value, or leave the field out.")
            return None
        try:
            return format(Decimal(str(value)), "f")
        except (ValueError, ArithmeticError):  # Python writes no integer of more than 4300 digits, Decimal no fraction
            self.faults.append(f"the field {name!r} is a number that has no decimal form; write it as text.")
            return None

    def domain(self) -> Domain:
        name, value = self._field("domain")
        if value is None:
            return "math"
        if not isinstance(value, str) or value not in self._domains:
            self.faults.append(
                f"the field {name!r} is {_shown(value)}; use one of {', '.join(self._domains)}, or name it in "
                "problems.domains."
            )
            return "math"
        return str.__str__(value)

    def choices(self) -> tuple[str, ...]:
        name, value = self._field("choices")
        if value is None:
            return ()
        if not isinstance(value, list | tuple) or not all(
            isinstance(choice, str) and choice.strip() for choice in value
        ):
            self.faults.append(f"the field {name!r} is {_shown(value)}; write a list of texts, none of them empty.")
            return ()
        if len(value) > len(string.ascii_uppercase):
            self.faults.append(f"the field {name!r} has {len(value)} choices, more than there are letters; shorten it.")
        self.faults += [f"the field {name!r}: a choice {fault}" for fault in map(encoding_fault, value) if fault]
        return tuple(map(str.__str__, value))

    def tests(self) -> tuple[CodeTest, ...]:
        name, value = self._field("tests")
        if value is None:
            return ()
        if not isinstance(value, list):
            self.faults.append(f"the field {name!r} is {_shown(value)}; write a list of tests.")
            return ()
        found = []
        for number, test in enumerate(value, start=1):
            fault = _test_fault(test)
            if fault is not None:
                self.faults.append(f"the field {name!r}: test {number} {fault}")
                return ()
            found.append(CodeTest(test["input"], test["output"], test.get("function")))
        return tuple(found)

    def _field(self, role: str) -> tuple[str, Any]:
        name = getattr(self._fields, role)
        return name, self._record.get(name)


def _test_fault(test: Any) -> str | None:
    if not isinstance(test, dict):
        return f'is {_shown(test)}; write {{"input": ..., "output": ...}}.'
    unknown = sorted(test.keys() - {"input", "output", "function"})
    if unknown:
        return f"has the unknown key {unknown[0]!r}; use input, output and, to call a function, function."
    for key in ("input", "output"):
        if not isinstance(test.get(key), str):
            return f"has no text {key!r}; add it."
        if (fault := encoding_fault(test[key])) is not None:
            return f"has a {key} that {fault}"
    function = test.get("function")
    if function is not None and not (isinstance(function, str) and function.isidentifier()):
        return f"names the function {function!r}; write the name that a program defines, or leave it out."
    return None


def _contradictions(
    domain: Domain,
    reference: str | None,
    answer: str | None,
    choices: Sequence[str],
    tests: Sequence[CodeTest],
) -> list[str]:
    found = []
    if domain == "multiple-choice":
        letters = string.ascii_uppercase[: len(choices)]
        if len(choices) < 2:
            found.append(f"the domain is multiple-choice, but the choices are {len(choices)}; give at least two.")
        elif answer is not None and (len(answer) != 1 or answer not in letters):
            found.append(
                f"the answer is {answer!r}, but the choices are A to {letters[-1]}; write one of these letters."
            )
    elif choices:
        found.append(f"there are choices, but the domain is {domain}; set the domain to multiple-choice.")
    if domain == "code":
        if not tests and reference is None:
            found.append("the domain is code, but there are neither tests nor a reference; add tests.")
    elif tests:
        found.append(f"there are tests, but the domain is {domain}; set the domain to code.")
    return found


def encoding_fault(text: str) -> str | None:
    """Return the fault of a text that cannot be encoded in UTF-8, which no tokenizer accepts; else None."""
    found = next((character for character in text if "\ud800" <= character <= "\udfff"), None)
    return None if found is None else f"contains {found!a}, a lone surrogate; write the character, or leave it out."


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # of a class of the user
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _shown_keys(record: dict[str, Any]) -> str:
    """Return the names of the first fields of a record; a source that is a function may have keys that are not
    text.
    """
    shown = [key if isinstance(key, str) and len(key) <= 60 else _shown(key) for key in itertools.islice(record, 20)]
    return ", ".join([*shown, *(["..."] if len(record) > len(shown) else [])]) or "no field"
