"""Refuses words that are not plain engineering English, in comments, docstrings, messages, names of tests and pages.

A dictionary checker such as codespell would also read identifiers, and Vale is not on the package index; what is needed
is the prose of Python files alone, so the tokens of the standard library are read here.
"""

import argparse
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ratchet import Ratchet, package_of, tracked_files

_STEMS = "initial|normal|serial|optim|recogn|summar|penal|quant|token|synchron|parallel|organ|minim|maxim"
# What is refused, as a regular expression of whole words, and the plain word for it.
WORDS = {
    r"anew": "again",
    r"as a rule": "usually",
    r"(any|every)body": "anyone, everyone",
    r"be had": "be computed, be obtained",
    r"begun": "started",
    r"(break|breaks|broke|broken|breaking) off": "abort",
    r"brought( along)?": "sent, loaded, installed",
    r"convoke[ds]?": "prepare",
    r"dull": "zero-variance",
    r"enlist(s|ed|ing)?": "connect",
    r"hangs? on(?! [A-Z])": "depends on",
    r"goes on": "continues",
    r"in the midst of": "during",
    r"in the place of": "in place of, as",
    r"in vain": "without success",
    r"in one go": "together",
    r"lend(s|ing)?|lent": "share",
    r"lies": "is",
    r"mend(s|ed|ing)?": "fix, correct",
    r"of a sudden": "suddenly",
    r"one behind the other": "contiguous",
    r"stands(?! (for|in|still)\b)": "is",
    r"tells? apart|told apart": "distinguish",
    r"told": "reported, given",
    r"under way": "in progress, in flight",
    r"whoever": "the caller, whatever component",
    r"behaviour": "behavior",
    r"colour(s|ed)?": "color",
    r"favour(s|ed|ite)?": "favor",
    r"licence(s|d)?": "license",
    r"neighbour(s|ing)?": "neighbor",
    rf"({_STEMS})is(e|es|ed|ing|ation|er)": "-ize",
    r"centre[ds]?": "center",
}
_REFUSED = re.compile("|".join(rf"(?P<w{n}>\b(?:{word})\b)" for n, word in enumerate(WORDS)), re.IGNORECASE)
_PLAIN = list(WORDS.values())
# The lists of words, and texts that are data: prompts are stored by their hash.
SKIPPED = ("tools/lint_words.py", "tests/test_lint.py", "exprl_megatron/judging/prompts/", "docs/glossary.md")
_COMMENTED = (".sh", ".yaml", ".yml", ".toml", ".in", "Makefile", "Dockerfile")


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line numbers and texts of `path` that people read: no identifiers, no code in pages."""
    if path.suffix == ".py":
        yield from _of_python(path.read_text(encoding="utf-8"))
    elif path.suffix == ".md":
        yield from _of_page(path.read_text(encoding="utf-8"))
    elif path.name.endswith(_COMMENTED):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if "#" in line:
                yield number, line[line.index("#") :]


def _of_python(text: str) -> Iterator[tuple[int, str]]:
    kinds = (tokenize.COMMENT, tokenize.STRING, tokenize.FSTRING_MIDDLE)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME and token.string.startswith("test_"):
            yield token.start[0], token.string.replace("_", " ")
        # A string without a space is a name, such as a value of the config.
        if token.type in kinds and " " in token.string:
            for offset, line in enumerate(token.string.splitlines()):
                yield token.start[0] + offset, re.sub(r"`[^`]*`", "", line)


def _of_page(text: str) -> Iterator[tuple[int, str]]:
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("    "):
            yield number, re.sub(r"`[^`]*`|\]\([^)]*\)", "", line)


def findings(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line, refused word and plain word of everything refused in `path`."""
    for number, text in prose(path):
        for found in _REFUSED.finditer(text):
            yield number, found[0], _PLAIN[int((found.lastgroup or "w0")[1:])]


def main() -> int:
    """Print the refused words of packages that have more than recorded; returns 1 if there are any."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("files", nargs="*", help="list the findings of these files or folders, whatever is recorded")
    options.add_argument("--update", action="store_true", help="record today's counts; refused where their sum rises")
    given = options.parse_args()
    paths = [path for path in tracked_files(given.files) if not path.as_posix().startswith(SKIPPED)]
    found = {path: list(findings(path)) for path in paths}
    lines = {package: [] for package in map(package_of, paths)}
    for path, hits in found.items():
        lines[package_of(path)] += [f"{path}:{number}: '{word}': write {plain}" for number, word, plain in hits]
    if given.files:
        print("\n".join(line for package in lines.values() for line in package))
        return 0
    counts = Counter({package: len(of_package) for package, of_package in lines.items()})
    return Ratchet("words").judge(counts, lines, update=given.update)


if __name__ == "__main__":
    sys.exit(main())
