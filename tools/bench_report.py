"""Size and opening time of a large page of `exprl report`: `python tools/bench_report.py DIRECTORY`.

Writes a run of 50 steps of 256 traces with the project's own writers, each trace in five segments with the judge's
words and question in the store, makes the page with and without references, and opens both in Chromium.
"""

import argparse
import importlib.util
import os
import random
import sys
import time
from pathlib import Path
from types import ModuleType

from playwright.sync_api import Browser, sync_playwright

from exprl_megatron.inspection.report_page.page_file import write_page
from exprl_megatron.inspection.report_page.page_model import PageReader
from exprl_megatron.judging.judgement import Scored
from exprl_megatron.judging.store import JudgementStore
from exprl_megatron.rollout.group import GradedTrace, Group, JudgedSegment
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.runs.journal import Journal, SampledStep

_ROOT = Path(__file__).parents[1]
_SEGMENTS = 5
_GROUP = 16
_WORDS = (
    "we",
    "find",
    "that",
    "the",
    "sum",
    "is",
    "odd",
    "because",
    "even",
    "prime",
    "root",
    "so",
    "let",
    "case",
    "proof",
)


def main() -> None:
    """Print bytes, traces with their texts, and seconds until the first curve is drawn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "directory", type=Path, help="where the run and its pages are written; a run that is there is used"
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--traces", type=int, default=256, help="traces of a step, a multiple of 16")
    parser.add_argument("--terms", type=int, default=66, help="six tokens each: 66 make traces of 396 tokens")
    arguments = parser.parse_args()
    run = arguments.directory / "run"
    if not run.exists():
        _write_run(run, arguments.steps, arguments.traces // _GROUP, arguments.terms)
    with sync_playwright() as playwright:
        finder = _module(_ROOT / "tools" / "find_browser.py")
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=finder.find_browser(playwright), args=sandbox)
        for references in (True, False):
            page = arguments.directory / f"{'with' if references else 'without'}_references.html"
            started = time.process_time()
            model = write_page(page, PageReader([run], references))
            steps = [place for each in model.tree["runs"] for place in each["places"]]
            kept, traces = (sum(place.get(name, 0) for place in steps) for name in ("kept", "traces"))
            print(f"{page}: {page.stat().st_size / 1e6:.1f} MB, {kept} of {traces} traces with their texts,", end=" ")
            print(f"made in {time.process_time() - started:.1f} s of CPU;", _opened(browser, page))
        browser.close()


def _opened(browser: Browser, page: Path) -> str:
    """Return the best of three, as other work on the machine only adds."""
    walls, computed = [], []
    for _ in range(3):
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        session = tab.context.new_cdp_session(tab)
        session.send("Performance.enable", {"timeDomain": "threadTicks"})
        started = time.monotonic()
        tab.goto(page.absolute().as_uri(), wait_until="commit")
        tab.wait_for_selector(".plot .main-svg")
        walls.append(time.monotonic() - started)
        metrics = {each["name"]: each["value"] for each in session.send("Performance.getMetrics")["metrics"]}
        computed.append(metrics["TaskDuration"])
        tab.close()
    return f"first curve after {min(walls):.2f} s, of which Chromium's main thread computes {min(computed):.2f} s"


def _write_run(root: Path, steps: int, groups: int, terms: int) -> None:
    sys.path.insert(0, str(_ROOT / "tests" / "inspection"))
    made = _module(_ROOT / "tests" / "inspection" / "report_runs.py")
    made.write_run(root)
    for file in (root / "journal").rglob("*.parquet"):
        file.unlink()
    tokenizer, draw = made._tokenizer(), random.Random(1)
    with JudgementStore(root / "judgements.sqlite") as store:
        for step in range(1, steps + 1):
            found = []
            for number in range(groups):
                problem = f"train-{1 + number % 2}"
                samples = (_trace(problem, place, tokenizer, draw, terms) for place in range(_GROUP))
                found.append(Group(problem, tuple(_graded(sample, made.REFERENCE, store, draw) for sample in samples)))
            Journal(root / "journal").write("parts", step, SampledStep(found, groups))


def _trace(problem: str, place: int, tokenizer: object, draw: random.Random, terms: int) -> Trace:
    parts = (f"s{i} {draw.randrange(100)} {draw.choice('+-*')} {draw.randrange(10)} = {i}" for i in range(terms))
    ids = tokenizer.encode(" ".join(parts), add_special_tokens=False)  # type: ignore[attr-defined]
    text = " " + tokenizer.decode(ids)  # type: ignore[attr-defined]
    log_probs = [-3 * draw.random() for _ in ids]
    return Trace(problem, place, [1] * 40, ids, log_probs, text, "stop", (("v1", 0, len(ids)),))


def _graded(trace: Trace, reference: str, store: JudgementStore, draw: random.Random) -> GradedTrace:
    tokens = len(trace.token_ids)
    segments = []
    for number in range(_SEGMENTS):
        key = f"{draw.getrandbits(256):064x}"
        answer = f"{' '.join(draw.choices(_WORDS, k=120))}\nScore: {draw.randrange(1, 6)}"
        judged = Scored(draw.randrange(5) / 4, answer, hash=key)
        question = f"Grade. The reference is: {reference}. {' '.join(draw.choices(_WORDS, k=200))}"
        asked = {"problem": trace.problem_id, "unit": "prefix", "rubric": None}
        store.add_judgement(key, asked | {"messages": [{"role": "user", "content": question}]}, answer, judged)
        ends = number * tokens // _SEGMENTS, (number + 1) * tokens // _SEGMENTS
        segments.append(JudgedSegment(*ends, judged))
    verified = Scored(float(draw.random() < 0.4), "boxed 12")
    return GradedTrace(trace, segments[-1].judgement, segments=tuple(segments), verified=verified)


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
