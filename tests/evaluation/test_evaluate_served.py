"""`exprl eval` as a user runs it, with a real server: killed in the midst, resumed, its counts added up again."""

import gzip
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chains import answer_text, chain_problem, problem_text, stated_answer
from helpers.processes import family, left_behind

pytestmark = pytest.mark.slow

MODEL = Path(__file__).parents[2] / "recipes" / "miniature" / "policy"
SAMPLES = 8
STEPS = (1, 2, 7)


def write_problems(path: Path) -> dict[str, dict]:
    """Chains of few steps, which the miniature's policy often ends, and long ones, which it hardly ever does."""
    rng = random.Random(5)
    chains = {f"chain/{steps}-{i}": chain_problem(rng, steps) for i in range(8) for steps in STEPS}
    records = {
        name: {"id": name, "problem": problem_text(chain), "answer": answer_text(chain), "steps": len(chain.operations)}
        for name, chain in chains.items()
    }
    path.write_text("".join(json.dumps(record) + "\n" for record in records.values()))
    return records


def command(directory: Path) -> list[str]:
    options = {
        "--problems": directory / "problems.jsonl",
        "--out": directory / "out",
        "--samples": SAMPLES,
        "--k": "1,4,8",
        "--temperature": 1.0,
        "--max-new-tokens": 60,
        # One problem at a time, so that the kill comes between two.
        "--concurrency": SAMPLES,
        "--seed": 3,
        "--json-file": directory / "figures.json",
        "--keep-unsolved": directory / "unsolved.jsonl",
    }
    flags = [str(part) for pair in options.items() for part in pair]
    return [sys.executable, "-m", "exprl_megatron.cli", "eval", str(MODEL), *flags]


def kept_files(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Time and content of every finished problem's files; its traces lie there before its counts do."""
    results = list((directory / "out" / "results").glob("*.json"))
    traces = [directory / "out" / "traces" / f"{path.stem}.jsonl.gz" for path in results]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in [*results, *traces]}


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory):
    """(directory, records, files kept before the kill, output of the second run)."""
    directory = tmp_path_factory.mktemp("eval")
    records = write_problems(directory / "problems.jsonl")
    with open(directory / "first.log", "w") as log:
        first = subprocess.Popen(command(directory), stdout=log, stderr=log)
    deadline = time.monotonic() + 300
    while len(kept_files(directory)) < 6 and first.poll() is None:
        assert time.monotonic() < deadline, "nothing was finished"
        time.sleep(0.005)
    assert first.poll() is None, (directory / "first.log").read_text()
    everyone = family(first.pid)
    first.kill()
    first.wait()
    assert not left_behind(everyone)
    before = kept_files(directory)
    # A problem whose result is lost must come out the same again.
    lost = min(before)
    Path(lost).unlink()
    second = subprocess.run(command(directory), capture_output=True, text=True, timeout=600)
    assert second.returncode == 0, second.stderr
    assert kept_files(directory)[lost][1] == before.pop(lost)[1]
    return directory, records, before, second.stdout


def samples(directory: Path) -> dict[str, list[dict]]:
    found = {}
    for path in (directory / "out" / "traces").glob("*.jsonl.gz"):
        lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().split("\n") if line]
        found[lines[0]["problem_id"]] = lines
    return found


def test_what_was_finished_before_the_kill_is_not_sampled_again(killed_and_resumed):
    directory, records, before, told = killed_and_resumed
    after = kept_files(directory)
    lost_traces = {path for path in before if path.endswith(".gz") and after[path][0] != before[path][0]}
    assert len(lost_traces) == 1
    assert all(after[path] == content for path, content in before.items() if path not in lost_traces)
    assert all(after[path][1] == before[path][1] for path in lost_traces)
    finished = len(before) // 2
    assert 2 <= finished < len(records)
    assert f"{len(records)} problems, {finished} of them finished before" in told
    assert len(after) == 2 * len(records)


def test_counts_are_those_of_the_samples(killed_and_resumed):
    directory, records, _, told = killed_and_resumed
    figures = json.loads((directory / "figures.json").read_text())
    right = {
        name: [stated_answer(line["text"]) == records[name]["answer"] for line in lines]
        for name, lines in samples(directory).items()
    }
    assert figures["counts"] == {name: [SAMPLES, sum(right[name])] for name in records}
    by_steps = {n: sum(sum(right[name]) for name in records if records[name]["steps"] == n) for n in STEPS}
    assert by_steps[1] > by_steps[2] > 0
    one, _, eight = figures["estimates"]
    assert one["mean"] == pytest.approx(sum(map(sum, right.values())) / (SAMPLES * len(records)))
    assert eight["mean"] == pytest.approx(sum(map(any, right.values())) / len(records))
    assert figures["abstained"]["samples"] == 0
    assert all(f"pass@{k}" in told for k in (1, 4, 8))


def test_samples_of_a_problem_differ_and_unsolved_problems_are_kept(killed_and_resumed):
    directory, records, _, _ = killed_and_resumed
    found = samples(directory)
    assert all([line["sample"] for line in lines] == list(range(SAMPLES)) for lines in found.values())
    several = [name for name in records if records[name]["steps"] > 1]
    assert sum(len({line["text"] for line in found[name]}) > 1 for name in several) > len(several) / 2
    counts = json.loads((directory / "figures.json").read_text())["counts"]
    unsolved = [json.loads(line) for line in (directory / "unsolved.jsonl").read_text().splitlines()]
    assert unsolved == [record for name, record in records.items() if counts[name][1] == 0]
    assert unsolved


def test_another_temperature_in_the_same_directory_is_refused(killed_and_resumed):
    directory, *_ = killed_and_resumed
    refused = subprocess.run([*command(directory), "--temperature", "0.7"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "has an evaluation with another sampling" in refused.stderr
