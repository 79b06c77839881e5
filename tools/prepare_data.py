"""Turns a public data set into problems: `python tools/prepare_data.py gsm8k-test --out build/gsm8k-test.jsonl`.

Each line of the output is a record with "id" and "problem" and, as far as the data set has them, "reference",
"answer", "domain", "choices", "tests" and "source".
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from problem_sets.catalog import HUB, Options, candidates, names

from exprl_megatron.errors import UserError
from exprl_megatron.judging.leaks import check_canary


def main() -> None:
    """Write one data set."""
    if "gsm8k" in sys.argv[1:2]:
        print("prepare_data: gsm8k is now called gsm8k-test, as its questions are the test split.", file=sys.stderr)
        sys.exit(2)
    arguments = _parser().parse_args()
    options = Options(arguments.seed, arguments.variants, arguments.max_tests)
    counts = {"filtered out": 0, "given twice": 0}
    try:
        if arguments.canary is not None:
            check_canary(arguments.canary)
        found = candidates(arguments.name, options, arguments.split, arguments.copy, arguments.solutions)
        kept = islice(_kept(found, counts), arguments.limit)
        written = _write(arguments.out, _with_canary(kept, arguments.canary))
    except UserError as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        sys.exit(2)
    left_out = ", ".join(f"{number} rows {what}" for what, number in counts.items() if number)
    print(f"{arguments.out}: {written} problems" + (f" ({left_out})" if left_out else ""))
    known = HUB[arguments.name].size if arguments.name in HUB else None
    if known is not None and arguments.limit is None and written != known:
        print(f"note: {arguments.name} is known to have {known} problems")


def _kept(found: Iterable[dict | None], counts: dict[str, int]) -> Iterator[dict]:
    """Yield the records, each id once; `counts` records what is left out."""
    seen = set()
    for record in found:
        if record is None:
            counts["filtered out"] += 1
        elif record["id"] in seen:
            counts["given twice"] += 1
        else:
            seen.add(record["id"])
            yield record


def _with_canary(records: Iterable[dict], canary: str | None) -> Iterator[dict]:
    """Yield the records with a line more in each reference, by which a reference that leaked is known."""
    for record in records:
        if canary is not None and "reference" in record:
            record = record | {"reference": f"{record['reference']}\n{canary}"}
        yield record


def _write(path: Path, records: Iterable[dict]) -> int:
    """Write JSON lines, all or nothing; the number of records."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    written = 0
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record) + "\n")
                written += 1
        if not written:
            raise UserError("No row of the data set became a problem; nothing was written.")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return written


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:<24}{about}" for name, about in sorted(names().items()))
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"data sets:\n{listed}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=sorted(names()), metavar="NAME")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--canary", metavar="TEXT", help="a line to plant into every reference")
    parser.add_argument("--limit", type=_positive, metavar="N", help="take the first N problems")
    parser.add_argument("--split", help="read this split instead of the data set's own")
    parser.add_argument(
        "--from", type=Path, dest="copy", metavar="PATH", help="read this copy on this machine instead of the hub"
    )
    parser.add_argument(
        "--solutions", type=Path, metavar="FILE", help="the same for livecodebench-v6-gemini's solutions"
    )
    parser.add_argument("--seed", type=int, default=0, help="order of choices, variants (default: 0)")
    parser.add_argument(
        "--variants", type=_positive, default=10, metavar="N", help="variants of each gsm-symbolic template (10)"
    )
    parser.add_argument(
        "--max-tests", type=_positive, metavar="N", help="the most tests of each program, the public ones first (all)"
    )
    return parser


if __name__ == "__main__":
    main()
