"""`exprl eval` before and after its servers: what it refuses, and what it makes of results that are there."""

import importlib
import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from exprl_megatron import cli
from exprl_megatron.errors import UserError
from exprl_megatron.evaluation.eval_config import EvalConfig
from exprl_megatron.evaluation.eval_report import result_lines, result_record, result_table, write_unsolved
from exprl_megatron.evaluation.evaluate import Grading, evaluate
from exprl_megatron.evaluation.questions import read_questions
from exprl_megatron.evaluation.result_store import ResultStore
from exprl_megatron.judging.judge_model import model_identity
from exprl_megatron.judging.judgement import Abstained, Scored
from exprl_megatron.plugins.loading import load_plugin
from exprl_megatron.rollout.group import GradedTrace
from exprl_megatron.rollout.trace import Trace

SAMPLES = 4


def write_problems(path: Path) -> list[dict]:
    records = [{"key": f"p{i}", "problem": f"What is {i} plus 1?", "answer": i + 1, "level": "easy"} for i in range(5)]
    records[4]["problem"] = "What is " + "1 plus " * 40 + "1?"
    records.append({"key": "essay", "problem": "Why?", "domain": "science"})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def settings_for(directory: Path, model: Path, **changes) -> EvalConfig:
    tree = {
        "model": str(model),
        "problems": {"source": str(directory / "problems.jsonl"), "fields": {"id": "key"}, "max_prompt_tokens": 60},
        "directory": str(directory / "out"),
        "samples": SAMPLES,
        "k": (1, 2, 4),
        "sampling": {"max_new_tokens": 16},
        "dtype": "float32",
    }
    return EvalConfig.model_validate(tree | changes)


def graded(problem_id: str, scores: list[float | None]) -> list[GradedTrace]:
    return [
        GradedTrace(
            Trace(problem_id, k, (1,), (2, 3), (-1.0, -1.0), "x", "length" if k == 0 else "stop", ()),
            Abstained("verifier-error") if score is None else Scored(score),
        )
        for k, score in enumerate(scores)
    ]


@pytest.fixture
def finished(tmp_path, tiny_model):
    """The settings of an evaluation all of whose problems are finished, and the records of its problems."""
    records = write_problems(tmp_path / "problems.jsonl")
    settings = settings_for(tmp_path, tiny_model("qwen3"))
    kept = ResultStore(Path(settings.directory), settings.identity(model_identity(settings.model)))
    verdicts = {"p0": [1, 0, 1, 1], "p1": [0, 0, 0, 0], "p2": [0, None, 1, 0], "p3": [None] * 4}
    for question in read_questions(settings).questions:
        name = question.problem.id
        kept.save(name, question.key, graded(name, verdicts[name]))
    kept.release()
    return settings, records


def test_finished_problems_are_not_sampled_again(finished):
    settings, _ = finished
    told = []
    evaluation = evaluate(settings, told.append)
    assert [result.problem_id for result in evaluation.results] == ["p0", "p1", "p2", "p3"]
    assert told == [
        "not measured: 1 of 1 science problems have no verifier, only a judge can grade them (essay); "
        "fix them or leave them out.",
        "not measured: 1 prompts of more than 60 tokens",
        "4 problems, 4 of them finished before",
    ]
    assert not (Path(settings.directory) / "logs").exists()


def test_the_report_counts_what_was_right_abstained_and_left_out(finished):
    settings, _ = finished
    evaluation = evaluate(settings, lambda text: None)
    record = json.loads(json.dumps(result_record(settings, evaluation)))
    assert record["counts"] == {"p0": [4, 3], "p1": [4, 0], "p2": [3, 1], "p3": [0, 0]}
    # By hand: pass@1 is 3/4, 0 and 1/3; pass@2 is 1, 0 and 2/3; pass@4 is 1 and 0.
    means = {estimate["k"]: (estimate["mean"], estimate["problems"]) for estimate in record["estimates"]}
    assert means[1] == (pytest.approx(13 / 36), 3)
    assert means[2] == (pytest.approx(5 / 9), 3)
    assert means[4] == (pytest.approx(1 / 2), 2)
    assert record["abstained"] == {
        "samples": 5,
        "problems": 2,
        "problems_without_verdict": 1,
        "reasons": {"verifier-error": 5},
    }
    assert record["left_out"] == {"nothing to verify with": 1, "prompt too long": 1}
    assert (record["mean_tokens"], record["overlong_share"]) == (2.0, 0.25)
    console = Console(file=io.StringIO(), width=120)
    console.print(result_table(settings, evaluation))
    assert "36.1 %" in console.file.getvalue() and "pass@4" in console.file.getvalue()
    assert result_lines(settings, evaluation)[1:] == [
        "abstentions: 5 samples of 2 problems (5 verifier-error)",
        "problems without any result: 1",
        "1 problems left out: nothing to verify with",
        "1 problems left out: prompt too long",
    ]


@pytest.mark.parametrize(("rate", "names"), [(0.0, ["p1"]), (0.34, ["p1", "p2"]), (1.0, ["p0", "p1", "p2"])])
def test_unsolved_problems_are_written_as_they_were_read(finished, tmp_path, rate, names):
    settings, records = finished
    out = tmp_path / "unsolved.jsonl"
    assert write_unsolved(out, evaluate(settings, lambda text: None), rate) == len(names)
    by_name = {record["key"]: record for record in records}
    assert [json.loads(line) for line in out.read_text().splitlines()] == [by_name[name] for name in names]


def test_more_problems_may_join_and_fewer_may_be_asked_for(finished):
    settings, _ = finished
    problems = settings.problems.model_copy(update={"limit": 2})
    evaluation = evaluate(settings.model_copy(update={"problems": problems}), lambda text: None)
    assert [result.problem_id for result in evaluation.results] == ["p0", "p1"]


@pytest.fixture
def run(tmp_path, tiny_model, monkeypatch, capsys):
    """`run(*options) -> stderr` of an `exprl eval` that is refused with status 2 before anything is written."""
    write_problems(tmp_path / "problems.jsonl")

    def call(*options: str, model: Path | None = None) -> str:
        command = ["exprl", "eval", str(model or tiny_model("qwen3")), "--problems", str(tmp_path / "problems.jsonl")]
        command += ["--field", "id=key", "--out", str(tmp_path / "out"), "--max-new-tokens", "16", *options]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = capsys.readouterr().err
        assert ended.value.code == 2, told
        assert not (tmp_path / "out").exists()
        return told

    return call


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--k", "1,200"), "k contains 200, more than the 16 samples; raise --samples."),
        (("--k", "1;4"), "--k is '1;4'; write numbers with commas between them"),
        (("--field", "id"), "'id' is not NAME=VALUE"),
        (("--field", "ids=key"), "problems.fields.ids is 'key': Extra inputs are not permitted."),
        (("--temperature", "0"), "sampling.temperature is 0.0: Input should be greater than 0."),
        (("--user", "Solve it."), "prompt.user is 'Solve it.' and never shows the problem"),
        (
            ("--json", "f.json"),
            "The arguments `f.json` are unknown; --json prints and takes no file; use --json-file f.json.",
        ),
        (("--max-new-tokens", "2048"), "has 1024 positions, including the prompt; lower --max-new-tokens."),
        (("--max-prompt-tokens", "3"), "None of the 5 problems has a prompt of at most 3 tokens"),
        (("--field", "answer=level", "--field", "problem=nothing"), "the field 'nothing' is missing"),
        (("--field", "problem=nothing"), "use --field problem"),
        (("--dtype", "int8"), "dtype is 'int8': Input should be"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(run, options, sentence):
    assert sentence in run(*options)


def test_problems_without_anything_to_verify_are_refused(run, tmp_path):
    (tmp_path / "problems.jsonl").write_text('{"key": "a", "problem": "Prove it."}\n')
    assert "1 of 1 math problems have no answer to compare with (a)" in run()


def test_a_directory_without_a_model_is_refused(run, tmp_path):
    assert "has no config.json; give a directory in Hugging Face form." in run(model=tmp_path)


def test_servers_replies_are_checked_as_those_of_a_run(tmp_path, tiny_model, monkeypatch):
    class Server:
        def client(self):
            return SimpleNamespace()

    async def sample(settings, clients, *_):
        seen.extend(clients)
        return []

    seen, module = [], importlib.import_module("exprl_megatron.evaluation.evaluate")
    monkeypatch.setattr(module, "start_servers", lambda specs: [Server()])
    monkeypatch.setattr(module, "stop_servers", lambda servers: None)
    monkeypatch.setattr(module, "_sample", sample)
    write_problems(tmp_path / "problems.jsonl")
    settings = settings_for(tmp_path, tiny_model("qwen3"))
    asked = read_questions(settings)
    module._measure(settings, [None], asked, asked.questions, None, Grading({}, lambda line: None))
    (client,) = seen
    assert client.vocabulary == asked.vocabulary > 0
    with pytest.raises(ValueError, match="text is not that of"):
        client.text_check.check(np.array([5, 6], np.int32), "anything else")


def test_by_default_a_sample_has_at_most_half_of_the_model_s_positions(tiny_model, tmp_path):
    from exprl_megatron.commands.eval_command import _max_new_tokens

    # Of 1,024 positions; no GPU.
    assert _max_new_tokens(tiny_model("qwen3")) == 512
    short = tmp_path / "short"
    shutil.copytree(tiny_model("qwen3"), short)
    config = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 512}
    (short / "config.json").write_text(json.dumps(config))
    assert _max_new_tokens(short) == 256


@pytest.fixture
def measured(tmp_path, tiny_model, monkeypatch):
    """The settings of an evaluation by a verifier of the user's own, whose module is in a directory of its own."""
    record = {"id": "m", "problem": "How long?", "answer": "2.0", "domain": "measured"}
    (tmp_path / "problems.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "custom_measures.py").write_text(
        "from exprl_megatron.api import Scored\n\n\ndef near(problem, trace):\n"
        "    return Scored(float(trace.text == problem.answer), trace.text)\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    problems = {"source": str(tmp_path / "problems.jsonl"), "domains": ["measured"]}
    custom = {"verifiers": {"measured": "custom_measures:near"}, "plugin_path": (str(tmp_path / "mine"),)}
    yield settings_for(tmp_path, tiny_model("qwen3"), problems=problems, **custom)
    sys.modules.pop("custom_measures", None)
    load_plugin.cache_clear()


def test_a_domain_with_a_verifier_of_the_users_own_is_measured_by_it(measured, monkeypatch):
    module = importlib.import_module("exprl_megatron.evaluation.evaluate")

    async def sampled(*_, on_trace, **__):
        traces = [
            Trace("m", k, (1,), (2,), (-1.0,), text, "stop", ()) for k, text in enumerate(["2.0", "3", "2.0", ""])
        ]
        for trace in traces:
            await on_trace(trace)
        return [traces]

    monkeypatch.setattr(module, "sample_groups", sampled)
    monkeypatch.setattr(module, "start_servers", lambda specs: [SimpleNamespace(client=NoClient)])
    monkeypatch.setattr(module, "stop_servers", lambda servers: None)
    (result,) = evaluate(measured, lambda text: None).results
    assert (result.counts.graded, result.counts.correct) == (4, 2)
    without = measured.model_copy(update={"verifiers": {}, "directory": measured.directory + "-without"})
    with pytest.raises(UserError, match=r"1 of 1 measured problems have no verifier in verifier\.domains"):
        evaluate(without, lambda text: None)


class NoClient:
    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        return None


def test_what_another_source_of_the_verifier_found_is_not_combined(measured):
    before = measured.identity("model")["verifiers"]["measured"]
    source = Path(measured.plugin_path[0]) / "custom_measures.py"
    source.write_text(source.read_text() + "# changed\n")
    assert measured.identity("model")["verifiers"]["measured"] != before


def test_the_verifiers_of_a_runs_config_are_taken_from_its_file(tmp_path, monkeypatch, command_line):
    eval_command = importlib.import_module("exprl_megatron.commands.eval_command")
    stage = {"kind": "sparse-rl", "steps": 1, "problems": {"source": "x", "domains": ["measured"]}}
    tree = {"directory": "d", "policy": {"model": "m"}, "stages": [stage], "plugin_path": ["mine"]}
    (tmp_path / "run.yaml").write_text(
        json.dumps(tree | {"verifier": {"domains": {"measured": "custom_measures:near"}}})
    )
    seen = []
    monkeypatch.setattr(eval_command, "_run", lambda settings, *_: seen.append(settings))
    arguments = ("--problems", "p.jsonl", "--config", tmp_path / "run.yaml", "--max-new-tokens", "8")
    assert command_line("eval", tmp_path, *arguments)[0] == 0
    assert seen[0].verifiers == {"measured": "custom_measures:near"} and seen[0].plugin_path == ("mine",)
    assert seen[0].problems.domains == ("measured",)
