"""`exprl leak-scan` on runs whose journals were written by hand."""

import json
import sys
from functools import partial
from pathlib import Path

import prepare_data
import pytest
from helpers.tiny_models import tiny_tokenizer

from exprl_megatron.config.load import check_config
from exprl_megatron.config.problems import ProblemsConfig, PromptConfig
from exprl_megatron.errors import UserError
from exprl_megatron.inspection.leak_scan import scan_run
from exprl_megatron.judging.judgement import Abstained, Scored
from exprl_megatron.problems.prompts import PromptBuilder
from exprl_megatron.problems.sources import load_problems
from exprl_megatron.rollout.group import GradedTrace, Group
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.runs.directory import RunDirectory
from exprl_megatron.runs.journal import Journal, SampledStep

ROOT = Path(__file__).parents[2]
CANARY = "EXPRL-CANARY-7f3a"
REFERENCES = (
    "First take twelve from both sides, then divide by three, which leaves seven as the only value that x can have.",
    "A square has four sides that are all alike, so its outline of forty units makes each side ten units long.",
    "Count the odd ones up to nineteen, which are ten, and since the sum of n odd numbers is n squared, it is 100.",
)


def write_problems(path: Path, canary: str | None) -> Path:
    planted = f"\n{canary}" if canary else ""
    records = [
        {"id": f"p{i}", "problem": f"What is asked in question {i}?", "reference": text + planted, "answer": "1"}
        for i, text in enumerate(REFERENCES)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


class HandmadeRun:
    """A run directory with two stages over three problems (or those of a file); `write` adds a step."""

    def __init__(self, root: Path, canary: str | None = None, problems: Path | None = None):
        self.model, self.problems = root / "policy", problems or write_problems(root / "problems.jsonl", canary)
        tokenizer = tiny_tokenizer(128)
        tokenizer.save_pretrained(self.model)
        self.directory = RunDirectory(root / "run")
        shared = {"steps": 3, "problems": {"source": str(self.problems)}, "sampling": {"max_new_tokens": 16}}
        tree = {
            "directory": str(self.directory.root),
            "policy": {"model": str(self.model), "max_tokens": 512},
            "judge": {"model": "j"},
            "leak_guard": {"canary": canary},
            "stages": [
                {"kind": "exprl-outcome", "name": "prime"} | shared,
                {"kind": "sparse-rl", "name": "sparse"} | shared,
            ],
        }
        self.directory.claim(check_config(tree, "test"), resume=False).release()
        self._builder = PromptBuilder(tokenizer, PromptConfig())
        self._texts = {problem.id: problem.statement for problem in load_problems(self.source)}

    @property
    def source(self) -> ProblemsConfig:
        return ProblemsConfig(source=str(self.problems))

    def group(self, problem_id: str, *texts: str, hint: str = "") -> Group:
        prompt = self._builder.token_ids(self._texts[problem_id] + hint)
        traces = [Trace(problem_id, k, prompt, (5,), (-0.1,), t, "stop", (("v0", 0, 1),)) for k, t in enumerate(texts)]
        verdicts = (Scored(0.5), Abstained("unreadable"))
        return Group(problem_id, tuple(GradedTrace(trace, verdicts[k % 2]) for k, trace in enumerate(traces)))

    def write(self, stage: str, step: int, *groups: Group) -> None:
        Journal(self.directory.journal).write(stage, step, SampledStep(list(groups), len(groups)))


@pytest.fixture
def exprl(command_line):
    return partial(command_line, "leak-scan", columns=160)


def test_a_clean_run_has_no_leak_however_good_its_traces_are(tmp_path, exprl):
    run = HandmadeRun(tmp_path, CANARY)
    run.write("prime", 1, run.group("p0", "I think so.", REFERENCES[0]), run.group("p1", "Ten.", "Forty."))
    run.write("prime", 2, run.group("p2", f"So: {REFERENCES[0]}", "Well."))
    status, printed, told = exprl(run.directory.root)
    assert (status, told) == (0, "")
    assert "No leak in 6 requests." in printed
    (stage,) = scan_run(run.directory).stages
    assert (stage.stage, stage.steps, stage.requests, stage.leaks) == ("prime", 2, 6, 0)
    # p2 comes last, and the next problem's reference, that of p0, is the wrong one for its traces.
    assert (stage.reciting_traces, stage.reciting_by_chance, stage.reproduced) == (1, 1, 1 / 6)


def test_a_request_with_a_piece_of_its_reference_is_found_and_named(tmp_path, exprl):
    run = HandmadeRun(tmp_path)
    run.write("prime", 1, run.group("p0", "a", "b"))
    piece = " ".join(REFERENCES[1].split()[4:18])
    run.write("sparse", 3, run.group("p0", "a", "b"), run.group("p1", "a", "b", hint=f" Hint: {piece}"))
    status, printed, _ = exprl(run.directory.root)
    assert status == 1
    assert "2 leaks, of the problems p1." in printed
    assert "outline" not in printed
    prime, sparse = scan_run(run.directory).stages
    assert (prime.leaking_requests, sparse.leaking_requests, sparse.requests) == (0, 2, 4)


@pytest.mark.parametrize("by_option", [True, False])
def test_a_planted_canary_is_found_in_requests_and_traces(tmp_path, exprl, by_option):
    run = HandmadeRun(tmp_path, None if by_option else CANARY)
    run.write("prime", 1, run.group("p0", "a", f"It ends in {CANARY.lower()}."))
    run.write("prime", 2, run.group("p1", "a", "b", hint=f" {CANARY}"))
    option = ("--canary", CANARY) if by_option else ()
    status, printed, _ = exprl(run.directory.root, *option, "--json")
    assert status == 1
    found = json.loads(printed)
    assert (found["leaks"], found["leaking_problems"], found["canary"]) == (3, ["p0", "p1"], True)
    (stage,) = found["stages"]
    assert [stage[name] for name in ("leaking_requests", "canary_requests", "canary_traces")] == [0, 2, 1]


def test_requests_whose_reference_is_too_short_are_counted_apart(tmp_path):
    run = HandmadeRun(tmp_path)
    run.problems.write_text(json.dumps({"id": "p0", "problem": "1 + 1?", "reference": "It's 2", "answer": "2"}) + "\n")
    run.write("prime", 1, run.group("p0", "It's 2", "It's 2"))
    (stage,) = scan_run(run.directory).stages
    assert (stage.requests, stage.unguarded_requests, stage.reciting_traces, stage.reproduced) == (2, 2, 0, 0.0)


def test_the_canaries_of_a_prepared_data_set_are_found(monkeypatch, tmp_path):
    prepared = tmp_path / "pope.jsonl"
    rows = ROOT / "tests" / "data" / "rows" / "pope.json"
    arguments = ["prepare_data.py", "pope", "--from", str(rows), "--out", str(prepared), "--canary", CANARY]
    monkeypatch.setattr(sys, "argv", arguments)
    prepare_data.main()
    run = HandmadeRun(tmp_path, CANARY, prepared)
    (problem,) = load_problems(run.source)
    run.write("prime", 1, run.group(problem.id, "a", "b"))
    run.write("sparse", 1, run.group(problem.id, "a", "b", hint=f"\n{problem.reference.for_judge()}"))
    prime, sparse = scan_run(run.directory).stages
    assert (prime.leaks, prime.requests, prime.unguarded_requests) == (0, 2, 0)
    assert (sparse.leaking_requests, sparse.canary_requests, sparse.canary_traces) == (2, 2, 0)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda run: run.directory.config.unlink(), "There is no run in"),
        (lambda run: Journal(run.directory.journal).path("prime", 1).unlink(), "has no saved rollouts"),
        (lambda run: run.problems.unlink(), "There is no problem file"),
        (lambda run: run.model.rename(run.model.with_name("elsewhere")), "tokenizer in .* is gone"),
        (lambda run: run.problems.write_text(run.problems.read_text().replace("p0", "q0")), "problem 'p0', which"),
    ],
    ids=["run", "journal", "problems", "tokenizer", "problem"],
)
def test_what_is_missing_is_one_sentence_and_never_a_clean_result(tmp_path, spoil, sentence):
    run = HandmadeRun(tmp_path)
    run.write("prime", 1, run.group("p0", "a"))
    spoil(run)
    with pytest.raises(UserError, match=sentence):
        scan_run(run.directory)
