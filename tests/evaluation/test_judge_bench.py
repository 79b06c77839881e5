"""`exprl judge-bench` from its arguments to its table, JSON and picture, with a judge whose ways are known."""

import json
import re
import shutil
import sys
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from exprl_megatron import cli
from exprl_megatron.judging.champ import load_champ

ROOT = Path(__file__).parents[2]
PROMPT = "## user\nP {problem} R {reference} T {trace} E\n"
PROBLEMS = range(1, 7)


class ReadingJudge(BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint that passes a trace where the reference says the same, or there is none.

    Asked at a temperature, it draws a score. A trace that says "shrug" gets no verdict.
    """

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._send({"data": []})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = request["messages"][-1]["content"]
        reference, trace = re.fullmatch(r"P .*? R (.*) T (.*) E", content, re.DOTALL).groups()
        score = 5 if reference in ("", trace) else 1
        if request["temperature"] > 0:
            score = 1 + zlib.crc32(str(request["seed"]).encode()) % 5
        text = "I cannot tell." if trace == "shrug" else f"Score: {score}"
        self._send({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})

    def _send(self, reply: dict):
        body = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Nothing is written to the terminal."""


class MarkingJudge(ReadingJudge):
    """Draws rubrics from references; approves of a text, in the form that it is asked in, where it is in `approved`."""

    approved = frozenset()

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        form, content = re.fullmatch(r"(\w+) (.*)", request["messages"][-1]["content"], re.DOTALL).groups()
        if form == "Draw":
            words = content.split()
            points = [{"text": f"claim {i}", "weight": 1, "quote": words[i]} for i in (0, -1)]
            answer = json.dumps({"checkpoints": points})
        elif form == "Mark":
            answer = f"Mark 1: absent\nMark 2: absent\nSound: {'yes' if content in self.approved else 'no'}"
        else:
            answer = f"Score: {4 if content in self.approved else 2}"
        self._send({"choices": [{"message": {"content": answer}, "finish_reason": "stop"}]})


def _serving(handler):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def endpoint():
    yield from _serving(ReadingJudge)


@pytest.fixture(scope="module")
def marking_endpoint():
    yield from _serving(MarkingJudge)


@pytest.fixture
def config(tmp_path, tiny_model, endpoint):
    """The tree of a config whose judge is the endpoint; `bench` writes it."""
    (tmp_path / "prompt.md").write_text(PROMPT)
    rows = [
        {"problem_id": f"p{i}", "problem": f"{i}?", "reference": f"it is {i}", "trace": text, "correct": correct}
        for i in PROBLEMS
        for text, correct in ((f"it is {i}", True), (f"it is {i * 10}", False), *([("shrug", False)] if i == 1 else []))
    ]
    (tmp_path / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompt = str(tmp_path / "prompt.md")
    return {
        "directory": str(tmp_path / "run"),
        "policy": {"model": str(tiny_model("qwen3")), "max_tokens": 128},
        "judge": {
            "model": str(tiny_model("qwen3")),
            "endpoints": [endpoint],
            "max_new_tokens": 16,
            "prompt": prompt,
            "prefix_prompt": prompt,
            "segment_prompt": prompt,
            "gate": {"traces": str(tmp_path / "judged.jsonl")},
        },
        "stages": [
            {"kind": "exprl-outcome", "name": "prime", "steps": 1, "problems": {"source": "a.jsonl"}}
            | {"sampling": {"max_new_tokens": 16}}
        ],
    }


@pytest.fixture
def bench(tmp_path, config, monkeypatch):
    """`bench(argument, ...)`: the exit status."""

    def call(*arguments: str) -> int:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        monkeypatch.setattr(sys, "argv", ["exprl", "judge-bench", str(path), *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code

    return call


def test_the_three_arms_of_a_judge_that_reads_the_reference(bench, capsys, tmp_path):
    figures, picture = tmp_path / "deep" / "bench.json", tmp_path / "bench.svg"
    assert not bench("--json-file", str(figures), "--picture", str(picture), "--repeats", "3")
    record = json.loads(figures.read_text())
    right, none, wrong = (record["arms"][arm] for arm in ("right", "none", "wrong"))
    assert (right["misplacement"], right["auroc"]) == (0, 1)
    assert (none["misplaced"]["false_positive"], none["misplacement"]) == (1, 0.5)
    assert (wrong["misplaced"]["false_negative"], wrong["misplacement"]) == (1, 0.5)
    assert right["traces"] == 13
    assert right["right_scores"] == [0, 0, 0, 0, 6]
    assert right["abstained"] == none["abstained"] == {"unreadable": 1}
    # Scores of 1..5 drawn at random: a fifth of the pairs is equal, and the deviation is sqrt(2).
    assert right["consistency"]["repeats"] == 3
    assert right["consistency"]["agreement"] < 0.6
    assert right["consistency"]["deviation"] > 0.7
    assert record["gate"] == {"passed": True, "says": None}
    assert "<svg" in picture.read_text()
    shown = capsys.readouterr().out
    assert "right reference" in shown and "gate: passed" in shown
    assert not (tmp_path / "run").exists()


def test_json_alone_is_on_stdout_where_it_is_wanted_and_a_file_needs_its_own_option(bench, capsys):
    assert not bench("--json", "--repeats", "0")
    out, err = capsys.readouterr()
    assert json.loads(out)["arms"]["right"]["traces"] == 13
    assert "right reference" in err and "gate: passed" in err
    assert bench("figures.json", "--json") == 2
    assert (
        "--json prints and takes no file; write the figures with --json-file figures.json." in capsys.readouterr().err
    )


def test_a_judge_that_is_within_the_bound_without_a_reference_is_remarked_on(config, bench, capsys, tmp_path):
    config["judge"]["gate"]["max_misplacement"] = 0.5
    figures = tmp_path / "bench.json"
    assert not bench("--json-file", str(figures))
    verdict = json.loads(figures.read_text())["gate"]
    assert verdict["passed"]
    assert verdict["says"].startswith("without a reference it misplaces 50.0%")
    assert f"gate: passed: {verdict['says']}" in capsys.readouterr().out


def test_a_gate_that_would_stop_a_run_says_so(config, bench, capsys, tmp_path):
    config["judge"]["show_reference"] = False
    figures = tmp_path / "bench.json"
    assert not bench("--json-file", str(figures), "--repeats", "0", "--limit", "8")
    verdict = json.loads(figures.read_text())["gate"]
    assert not verdict["passed"]
    assert verdict["says"].startswith("this judge would stop a run: the judge did not pass its gate on 8 traces of ")
    assert "max_misplacement (20.0%)" in verdict["says"]
    assert verdict["says"] in capsys.readouterr().out


def test_a_process_judge_is_scored_at_champs_first_wrong_steps(config, bench, capsys, tmp_path):
    config["judge"]["show_reference"] = False
    figures = tmp_path / "champ.json"
    assert not bench("--champ", "--limit", "6", "--json-file", str(figures))
    units = json.loads(figures.read_text())["units"]
    assert list(units) == ["prefix", "segment"]
    for found in units.values():
        # Without a reference this judge passes everything that its 1,024 tokens of context hold.
        assert found["traces"] == 6
        assert found["abstained"] <= 1
        assert found["mean_before"] == found["mean_after"] == 5
        assert found["auroc"] == found["paired_auroc"] == 0.5
        assert found["falls"] == found["rises"] == 0 < found["equals"]
    shown = capsys.readouterr().out
    assert "AUROC within a trace" in shown
    assert "pairs that fall / equal / rise" in shown


def test_both_forms_of_judging_prefixes_have_the_same_figures_at_champs_marks(
    config, bench, marking_endpoint, tiny_model, monkeypatch, tmp_path
):
    pairs = [
        (t.text_before_error("prefix"), t.text_with_error("prefix"))
        for t in load_champ(8)
        if t.error_span and t.text_before_error("prefix")
    ]
    assert len(pairs) > 4
    # The first pair rises, the second is equal, all others fall.
    approved = {pairs[0][1], *pairs[1], *(before for before, _ in pairs[2:])}
    monkeypatch.setattr(MarkingJudge, "approved", approved)
    judge = tmp_path / "long"
    shutil.copytree(tiny_model("qwen3"), judge)
    described = json.loads((judge / "config.json").read_text())
    (judge / "config.json").write_text(json.dumps(described | {"max_position_embeddings": 16384}))
    files = {"scale": "Scale {trace}", "marks": "Mark {trace}", "builder": "Draw {reference}"}
    for name, text in files.items():
        said = "## system\n{rubric} Sound: yes or no\n" if name == "marks" else ""
        (tmp_path / f"{name}.md").write_text(f"{said}## user\n{text}")
    config["judge"] |= {"endpoints": [marking_endpoint], "model": str(judge)}
    found = {}
    for kind, prompt in (("reference", "scale"), ("checkpoints", "marks")):
        config["judge"] |= dict.fromkeys(("prefix_prompt", "segment_prompt"), str(tmp_path / f"{prompt}.md"))
        config["judge"]["rubric"] = {"kind": kind, "prompt": str(tmp_path / "builder.md"), "max_new_tokens": 64}
        assert not bench("--champ", "--limit", "8", "--json-file", str(tmp_path / "champ.json"))
        found[kind] = json.loads((tmp_path / "champ.json").read_text())["units"]["prefix"]
    for figures in found.values():
        assert figures["abstained"] == 0
        assert (figures["falls"], figures["equals"], figures["rises"]) == (len(pairs) - 2, 1, 1)
        assert figures["paired_auroc"] == (len(pairs) - 1.5) / len(pairs)
    assert found["reference"]["auroc"] == found["checkpoints"]["auroc"]
    # Two of the texts with the wrong step are approved: 4 or else 2 points, and 0.3 or else 0 in [0, 1].
    rest = len(pairs) - 2
    assert found["reference"]["mean_after"] == pytest.approx((2 * 4 + rest * 2) / len(pairs))
    assert found["checkpoints"]["mean_after"] == pytest.approx((2 * (1 + 4 * 0.3) + rest * 1) / len(pairs))


@pytest.mark.parametrize(
    "change, arguments, sentence",
    [
        ({"gate": None}, [], "There are no labeled traces to judge; give --traces, or set judge.gate.traces."),
        ({}, ["--picture", "bench.bmp"], "let its name end in .png, .svg, .pdf."),
        ({}, ["--champ", "--picture", "bench.svg"], "leave --traces and --picture out."),
        ({"model": "nowhere"}, [], "nowhere, the judge's model, has no config.json"),
        ({"prompt": "nowhere"}, [], "There is no judge prompt 'nowhere'"),
        ({}, ["--traces", "nowhere.jsonl"], "The labeled traces nowhere.jsonl cannot be read"),
    ],
)
def test_what_cannot_be_used_is_refused_in_a_sentence(config, bench, capsys, change, arguments, sentence):
    config["judge"] |= change
    assert bench(*arguments) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count("\n") == 1


def test_a_config_without_a_judge_is_refused(config, bench, capsys):
    del config["judge"]
    config["stages"][0]["kind"] = "sparse-rl"
    assert bench() == 2
    assert "The config has no judge; add the section `judge`." in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_miniatures_judge_passes_its_gate_on_a_real_server(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    figures, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    arguments = ["recipes/configs/demo.yaml", "judge.gate.limit=null", "--repeats", "2"]
    outputs = ["--json-file", str(figures), "--picture", str(picture)]
    monkeypatch.setattr(sys, "argv", ["exprl", "judge-bench", *arguments, *outputs])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    print(capsys.readouterr().out)
    record = json.loads(figures.read_text())
    right, none, wrong = (record["arms"][arm] for arm in ("right", "none", "wrong"))
    assert right["traces"] == 300
    assert right["misplacement"] <= 0.15
    assert right["auroc"] >= 0.9
    assert min(none["misplacement"], wrong["misplacement"]) >= 0.35
    assert right["consistency"]["agreement"] >= 0.8
    assert record["gate"]["passed"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_judge_behind_a_closed_api_needs_no_model_directory(config, bench, capsys):
    config["judge"] |= {"model": None, "endpoint_model": "big-1"}
    assert bench("--repeats", "0") == 0
    assert "big-1 on 13 traces of 6 problems" in " ".join(capsys.readouterr().out.split())
