"""tools/prepare_data.py as it is called: what it writes, leaves out, plants and refuses."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import prepare_data
import pytest

from exprl_megatron.config.problems import ProblemsConfig
from exprl_megatron.problems.sources import load_problems

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "tests" / "data" / "rows"


@pytest.fixture
def prepare(monkeypatch, capsys):
    """`prepare(arguments, ...)`: exit status, output and errors of the program, run in this process."""

    def call(*arguments: str) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *arguments])
        status = 0
        try:
            prepare_data.main()
        except SystemExit as ended:
            status = ended.code
        captured = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=captured.out, stderr=captured.err)

    return call


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_gsm8k_has_its_hundred_questions_with_worked_solutions(tmp_path):
    out = tmp_path / "new" / "gsm8k-test.jsonl"
    command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), "gsm8k-test", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, f"{out}: 100 problems\n")
    written = {record["id"]: record for record in records(out)}
    assert len(written) == 100
    assert written["gsm8k-480"] == {
        "id": "gsm8k-480",
        "problem": "Ben has 4 tubes of blue paint and 3 tubes of yellow paint. Jasper has half as many tubes of blue "
        "paint as Ben, and three times as many tubes of yellow paint as Ben. How many tubes of paint does Jasper have?",
        "reference": "Jasper has 4*1/2= 2 tubes of blue paint\nJasper has 3*3=9 tubes of yellow paint\n"
        "Jasper has a total of 2+9 =11 tubes of paint\n#### 11",
        "answer": "11",
        "domain": "math",
        "source": "gsm8k-test",
    }
    assert len(load_problems(ProblemsConfig(source=str(out)))) == 100


def test_a_limit_and_a_canary(prepare, tmp_path):
    out = tmp_path / "champ.jsonl"
    assert prepare("champ", "--out", str(out), "--limit", "3", "--canary", "CANARY-7").returncode == 0
    assert [record["reference"].splitlines()[-1] for record in records(out)] == ["CANARY-7"] * 3
    assert not any("CANARY-7" in record["problem"] + record["answer"] for record in records(out))


def test_a_canary_too_short_to_be_one_is_refused_before_anything_is_written(prepare, tmp_path):
    out = tmp_path / "champ.jsonl"
    done = prepare("champ", "--out", str(out), "--limit", "3", "--canary", "CAN-7")
    assert (done.returncode, out.exists()) == (2, False)
    assert "'CAN-7' occurs by chance; use one of at least 8 characters" in done.stderr


def test_rows_left_out_are_counted_and_a_known_size_is_shown(prepare, tmp_path):
    out = tmp_path / "openmath.jsonl"
    done = prepare("openmath", "--out", str(out), "--from", str(ROWS / "openmath.json"))
    assert done.stdout == f"{out}: 1 problems (4 rows filtered out, 1 rows given twice)\n"
    done = prepare("pope", "--out", str(out), "--from", str(ROWS / "pope.json"))
    assert done.stdout.endswith("(1 rows filtered out)\nnote: pope is known to have 1076 problems\n")


def test_without_a_problem_nothing_is_written(prepare, tmp_path):
    rows = json.loads((ROWS / "pope.json").read_text())[1:]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    out = tmp_path / "pope.jsonl"
    done = prepare("pope", "--out", str(out), "--from", str(tmp_path / "rows.json"))
    assert done.returncode == 2
    assert done.stderr == "prepare_data: No row of the data set became a problem; nothing was written.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]
