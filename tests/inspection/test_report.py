"""`exprl report` as it is typed: what is in the page, what is left out of it, and that nothing in it is markup."""

import base64
import gzip
import html
import json
import stat
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_runs import (
    CANARY,
    FIRST,
    POLICY,
    REFERENCE,
    SECOND,
    STEPS,
    write_killed_run,
    write_run,
    write_step_of_an_earlier_version,
    write_unscored_run,
)

from exprl_megatron.inspection.report_page.page_blocks import PageBlock, SizeBudget, pack
from exprl_megatron.inspection.report_page.page_file import write_page
from exprl_megatron.inspection.report_page.page_model import PageReader
from exprl_megatron.inspection.report_page.run_pages import RunPages, StepKey
from exprl_megatron.inspection.report_page.trace_records import TraceRecords
from exprl_megatron.inspection.rollout_steps import logged_groups
from exprl_megatron.inspection.trace_text import PolicyTokenizer
from exprl_megatron.planning.hardware import find_gpu
from exprl_megatron.runs.directory import RunDirectory, read_config

HOSTILE = "</script><script>hacked=1</script><img src=x onerror=hacked=2><!-- {{7*7}} &amp; \u202e \x1b[2J '\"`"


class _Page(HTMLParser):
    """The elements of a page by their tags, and the texts of its data elements by their ids."""

    def __init__(self, path: Path):
        super().__init__(convert_charrefs=False)
        self.elements: list[tuple[str, dict]] = []
        self.data: dict[str, str] = {}
        self.feed(path.read_text())
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        tag, attributes = self.elements[-1] if self.elements else ("", {})
        if tag == "script" and "id" in attributes:
            self.data[attributes["id"]] = self.data.get(attributes["id"], "") + data

    @property
    def model(self) -> dict:
        return json.loads(self.data["model"])

    def block(self, key: str) -> dict:
        return _opened(self.data[f"block-{key}"])


def _opened(packed: str) -> dict:
    return json.loads(gzip.decompress(base64.b64decode(packed)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [write_run(root / "a" / "first"), write_run(root / "b" / "second", learning_rate=2e-4)]


@pytest.fixture(scope="module")
def first(runs, tmp_path_factory):
    """The page of the first run, with its references."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(path, PageReader(runs[:1], references=True))
    return path


@pytest.fixture
def exprl(command_line):
    return partial(command_line, "report")


@pytest.fixture
def page(exprl, tmp_path):
    """`page(run, ..., options)`: what the page that is made of them holds."""

    def make(*arguments: object) -> _Page:
        status, _, complaint = exprl(*arguments, "--out", tmp_path / "page.html")
        assert (status, complaint) == (0, "")
        return _Page(tmp_path / "page.html")

    return make


def test_curves_evaluations_time_and_differing_config_are_in_the_page(page, runs):
    tree = page(*runs).model
    assert [run["name"] for run in tree["runs"]] == ["first", "second"]
    curves = tree["runs"][0]["curves"]
    assert curves["steps"] == [1, 2, 3, 4, 5, 6]
    assert curves["stages"] == ["parts"] * STEPS + ["sparse"] * STEPS
    assert curves["metrics"]["reward/mean"] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert curves["metrics"]["kl/old"][:2] == [None, 0.01]
    assert [(each["step"], each["values"]["pass@1"]) for each in curves["evaluations"]] == [(0, 0.1), (6, 0.6)]
    time = tree["runs"][0]["time"]
    assert dict(zip(time["phases"], time["steps"][0]["seconds"], strict=True))["sampling"] == 6
    assert "sampling is the bottleneck, 60%" in time["stages"]["parts"]
    differing = {row["key"]: row["values"] for row in tree["config"] if row["differs"]}
    assert differing["stages.parts.optimizer.lr"] == ["0.0001", "0.0002"]
    assert "policy.model" not in differing


def test_a_trace_has_its_segments_scores_advantages_words_and_the_judges_question(first):
    made = _Page(first)
    place = made.model["runs"][0]["places"][0]
    assert (place["stage"], place["step"], place["traces"], place["kept"]) == ("parts", 1, 4, 4)
    agreed, hacked = made.block(place["block"])["groups"][0]["traces"]
    assert [segment["text"] for segment in agreed["texts"]["segments"]] == [" " + FIRST, " " + SECOND]
    # DeltaNorm: A_1 = s_1 - s_T, A_2 = s_2 - s_1 (arXiv 2606.17024, equations 2 and 5).
    assert [segment["advantage"] for segment in agreed["texts"]["segments"]] == [-0.75, 0.75]
    assert hacked["out"] and hacked["texts"]["segments"][0]["reason"] == "unreadable"
    judged = agreed["texts"]["segments"][1]["judged"]
    assert REFERENCE in judged["asked"]["messages"][0][1]
    assert [checkpoint["mark"] for checkpoint in judged["asked"]["rubric"]] == ["established", "absent"]
    tokens = agreed["texts"]["tokens"]
    assert tokens["log_probs"][:4] == [-250, -500, -750, -1000]
    assert sum(tokens["characters"]) == len(f" {FIRST} {SECOND}")
    assert tokens["gaps"] == [0.0, 0.5] + [0.0] * (len(tokens["log_probs"]) - 2)
    assert "gaps" not in hacked["texts"]["tokens"]


def test_the_judges_figures_are_those_of_all_traces(first):
    judge = _Page(first).model["runs"][0]["places"][0]["judge"]
    # Two groups, each with the scores 0.25 and 1, and an abstention and 0.75.
    assert judge["scores"] == [0, 0, 2, 0, 0, 0, 0, 2, 0, 2]
    assert judge["abstained"] == {"unreadable": 2}
    assert judge["agreement"] == {"compared": 4, "disagree": 2, "right": 1.0, "wrong": 0.75}
    assert sum(map(sum, judge["lengths"])) == 4


def test_without_references_nothing_of_one_is_in_the_file(page, first, runs, tmp_path):
    words = REFERENCE.split()
    fragments = {CANARY} | {" ".join(words[at : at + 3]) for at in range(len(words) - 2)}

    def found(made: _Page, path: Path) -> set[str]:
        blocks = [json.dumps(made.block(place["block"])) for place in made.model["runs"][0]["places"]]
        return {text for text in fragments for part in (path.read_text(), *blocks) if text in part}

    assert found(_Page(first), first) == fragments
    assert found(page(runs[0], "--without-references"), tmp_path / "page.html") == set()


def test_without_references_no_20_characters_of_one_are_in_the_file_in_any_form(page, tmp_path):
    """Judge's words, prompt, rubric, marks; verifier's evidence and reasons; errors, the command, names of metrics."""
    run = write_run(tmp_path / "run", said=REFERENCE)
    write_step_of_an_earlier_version(run)
    record = json.loads((run / "run.json").read_text())
    record |= {"command": f"exprl train x.yaml leak_guard.canary={CANARY}"}
    record["exit"] = {"status": 1, "message": f"The verifier failed on {REFERENCE}"}
    (run / "run.json").write_text(json.dumps(record))
    metrics = {f"abstained/{REFERENCE}": 0.5, "abstained/too-long": 0.1, "loss": 1.0}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": "sparse", "step": 9, "wall_s": 99.0, "metrics": metrics}) + "\n")
    windows = {CANARY} | {REFERENCE[at : at + 20] for at in range(len(REFERENCE) - 19)}

    def found(made: _Page) -> set[str]:
        text = (tmp_path / "page.html").read_text()
        packed = [
            gzip.decompress(base64.b64decode(data)).decode() for name, data in made.data.items() if "block" in name
        ]
        forms = [text, html.unescape(text), json.dumps(made.model, ensure_ascii=False), *packed]
        forms += [json.dumps(json.loads(each), ensure_ascii=False) for each in packed]
        return {window for window in windows for form in forms if window in " ".join(form.split())}

    assert found(page(run)) == windows
    without = page(run, "--without-references")
    assert found(without) == set()
    assert {"abstained/too-long", "loss"} <= without.model["runs"][0]["curves"]["metrics"].keys()
    assert without.model["runs"][0]["record"]["status"] == "1"


def test_a_page_with_references_is_its_owners_alone(first):
    assert stat.S_IMODE(first.stat().st_mode) == 0o600


def test_no_text_of_a_run_is_markup_or_can_reorder_what_is_shown(page, tmp_path):
    run = write_run(tmp_path / HOSTILE.replace("/", ""), problem=HOSTILE, said=f"{HOSTILE} \ud800")
    made = page(run)
    keys = {place["block"] for each in made.model["runs"] for place in each["places"]}
    # The data, the blocks (steps with the same traces share one), the plotting library and the page's program.
    assert sum(tag == "script" for tag, _ in made.elements) == 1 + len(keys) + 2
    assert not {tag for tag, _ in made.elements} & {"img", "iframe", "object", "embed", "base"}
    assert not [name for _, attributes in made.elements for name in attributes if name.startswith("on")]
    group = made.block(made.model["runs"][0]["places"][0]["block"])["groups"][0]
    assert group["problem"] == HOSTILE.replace("\u202e", "\ufffd").replace("\x1b", "\u241b")
    text = json.dumps(made.model) + json.dumps(made.block(made.model["runs"][0]["places"][0]["block"]))
    assert "hacked=2" in text
    assert not [sign for sign in ("\\u202e", "\\u001b", '"\\ud') if sign in text]


def test_a_damaged_step_is_named_and_the_others_are_shown(page, tmp_path):
    run = write_run(tmp_path / "run")
    (run / "journal" / "parts" / "step-000002.parquet").write_bytes(b"PAR1")
    places = page(run).model["runs"][0]["places"]
    assert "step-000002.parquet is damaged" in places[1]["fault"]
    assert [place.get("kept") for place in places[:3]] == [4, None, 4]


def test_a_run_killed_in_its_first_step_has_a_page(exprl, tmp_path):
    run = write_killed_run(tmp_path / "run")
    status, said, _ = exprl(run, "--out", tmp_path / "page.html")
    assert status == 0 and "no traces yet" in said
    (shown,) = _Page(tmp_path / "page.html").model["runs"]
    assert (shown["curves"]["steps"], shown["places"], shown["time"]["steps"]) == ([], [], [])


def test_a_page_that_is_read_again_compares_with_what_was_measured_meanwhile(tmp_path, monkeypatch):
    monkeypatch.setattr("exprl_megatron.inspection.machine.measured_cpu", lambda processes: find_gpu("h100"))
    run = write_killed_run(tmp_path / "run")
    reader = PageReader([run], references=True)

    def predicted() -> dict:
        return reader.model(page_bytes=10**6).tree["runs"][0]["predicted"]

    assert "has finished no step" in predicted()["missing"]
    write_unscored_run(tmp_path / "other")
    (tmp_path / "other" / "metrics.jsonl").rename(run / "metrics.jsonl")
    assert predicted()["rows"][-1]["measured_s"] == 1.0


def test_metrics_that_are_not_finite_are_missing_in_the_page(page, tmp_path):
    (shown,) = page(write_unscored_run(tmp_path / "run")).model["runs"]
    assert shown["curves"]["metrics"] == {"loss": [None], "kl/old": [None], "reward/mean": [0.0], "seconds/step": [1.0]}
    assert shown["places"][0]["judge"]["abstained"] == {"timeout": 2}


def test_a_step_is_read_again_when_the_trainers_log_probs_of_it_are_complete(tmp_path):
    run = write_run(tmp_path / "run")
    complete, elsewhere = run / "trainer_log_probs" / "parts" / "step-000001", tmp_path / "elsewhere"
    complete.rename(elsewhere)
    pages = RunPages(run, "run", references=True)

    def has_gaps() -> bool:
        ((_, block),) = pages.read([StepKey("parts", 1)], lambda: 10**6)
        return "gaps" in _opened(block.packed)["groups"][0]["traces"][0]["texts"]["tokens"]

    assert not has_gaps()
    elsewhere.rename(complete)
    assert has_gaps()


def test_what_does_not_fit_is_left_out_and_counted_and_disagreements_come_first(runs):
    directory = RunDirectory(runs[0])
    groups = list(logged_groups(directory, read_config(directory), "parts", 1))
    records = TraceRecords(PolicyTokenizer(str(POLICY)), {}, lambda key: None, references=True)
    blocks = [pack(groups, records, most) for most in range(100, 1200, 20)]
    kept = [block.index["kept"] for block in blocks]
    assert kept == sorted(kept) and {kept[0], kept[-1]} == {0, 4} and len(set(kept)) > 2
    assert {block.index["traces"] for block in blocks} == {4}
    # A group of which one trace fits has the figures of both, and the text of the one with the disagreement.
    (group,) = _opened(next(block for block in blocks if block.index["kept"] == 1).packed)["groups"]
    assert [("texts" in trace, trace["tokens"] > 0) for trace in group["traces"]] == [(False, True), (True, True)]


def test_what_one_step_leaves_of_its_room_is_for_those_after_it():
    room = SizeBudget(1000, 4)
    assert room.share() == 250
    room.spend(PageBlock({}, "x" * 100))
    assert room.share() == 300


def test_a_directory_without_a_run_or_no_place_for_the_page_is_one_sentence(exprl, runs, tmp_path):
    status, _, complaint = exprl(tmp_path, "--out", tmp_path / "page.html")
    assert (status, complaint.count("\n")) == (2, 1) and "There is no run in" in complaint
    status, _, complaint = exprl(runs[0])
    assert status == 2 and "--out F.html, or --serve" in complaint
