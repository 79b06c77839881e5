"""How often the math verifier agrees with math-verify's own tests.

    git clone https://github.com/huggingface/Math-Verify
    .venv/bin/python tools/verifier_agreement.py Math-Verify/tests

Each test is a right answer, a model's text and whether the text is right. A text without a box is put into one: the
verifier wants a stated answer, where math-verify also takes any expression. Prints a table in Markdown, and below it
every case on which the two differ.
"""

import argparse
import asyncio
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from exprl_megatron.judging.judgement import Scored
from exprl_megatron.rewards.extraction import extract_answer
from exprl_megatron.rewards.math_answer import MathVerifier


def cases(module: ModuleType) -> Iterator[tuple[str, str, bool]]:
    """Gold, text and verdict of every parametrized test of the module that has just these."""
    for test in vars(module).values():
        for mark in getattr(test, "pytestmark", ()):
            names = mark.args[0] if mark.name == "parametrize" else ""
            names = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
            if len(names) == 3 and names[0] == "gold" and names[1] in ("pred", "prediction"):
                for gold, text, right in mark.args[1]:
                    if isinstance(gold, str) and isinstance(text, str):
                        yield gold, text, bool(right)


async def verdicts(verifier: MathVerifier, found: list[tuple[str, str, bool]]) -> list[bool | None]:
    """Return what the verifier says of each case; None where it abstains."""

    async def verdict(gold: str, text: str) -> bool | None:
        stated = text if extract_answer(text) is not None else f"\\boxed{{{text}}}"
        judgement = await verifier.verify(extract_answer(gold) or gold, stated)
        return bool(judgement.value) if isinstance(judgement, Scored) else None

    return await asyncio.gather(*(verdict(gold, text) for gold, text, _ in found))


def main() -> None:
    """Print the table and the differences."""
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("tests", type=Path, help="The directory `tests` of a checkout of Math-Verify.")
    directory = arguments.parse_args().tests.absolute()
    sys.path.insert(0, str(directory.parent))
    print("| tests | cases | agree | we say wrong | we say right | abstained |\n|---|---|---|---|---|---|")
    differences = []
    with MathVerifier() as verifier:
        for file in sorted(directory.glob("test_*.py")):
            found = list(cases(importlib.import_module(f"{directory.name}.{file.stem}")))
            if not found:
                continue
            ours = asyncio.run(verdicts(verifier, found))
            pairs = [(own, right) for own, (_, _, right) in zip(ours, found, strict=True)]
            counts = [pairs.count(kind) for kind in ((False, True), (True, False))]
            agree, abstained = sum(own == right for own, right in pairs), ours.count(None)
            print(f"| {file.stem} | {len(found)} | {agree} | {counts[0]} | {counts[1]} | {abstained} |")
            differences += [(file.stem, own, case) for own, case in zip(ours, found, strict=True) if own != case[2]]
    for name, own, (gold, text, _) in differences:
        print(f"\n{name}: we say {own}\n  gold {gold!r}\n  text {text[-200:]!r}")


if __name__ == "__main__":
    main()
