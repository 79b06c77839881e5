"""The page of `exprl report` in Chromium: what is shown, by mouse and keys, wide and narrow; that no request leaves."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import Locator, expect, sync_playwright
from report_runs import CANARY, FIRST, write_killed_run, write_run, write_unscored_run

from exprl_megatron.inspection.report_page.page_file import write_page
from exprl_megatron.inspection.report_page.page_model import PageReader

FIND = Path(__file__).parents[2] / "tools" / "find_browser.py"
pytestmark = pytest.mark.slow
DEADLINE_MS = 120_000
HOSTILE = "</script><script>hacked=1</script><img src=http://127.0.0.1:9/x onerror=hacked=2><b>bold</b>"


@pytest.fixture(scope="module")
def chromium():
    spec = importlib.util.spec_from_file_location("find_browser", FIND)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with sync_playwright() as playwright:
        path = module.find_browser(playwright)
        assert path is not None, "there is no Chromium: run tools/setup_browser.sh"
        # Chromium's own sandbox refuses root.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    runs = [
        write_run(root / "first"),
        write_run(root / "second", problem=HOSTILE, said=HOSTILE, learning_rate=2e-4),
    ]
    write_page(root / "page.html", PageReader(runs, references=True))
    return root / "page.html"


class _Tab:
    """An opened page, with what it has asked for and complained of."""

    def __init__(self, browser, file: Path | str, **context):
        self.context = browser.new_context(reduced_motion="reduce", **context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(DEADLINE_MS)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.goto(file if isinstance(file, str) else file.as_uri())
        self.page.wait_for_selector("#tabs button")

    def open(self, tab: str) -> None:
        self.page.click(f"#tab-{tab}")

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_inner_texts()

    def has(self, selector: str, text: str) -> None:
        """Wait until what `selector` finds first has the text: the page draws charts and reads traces later."""
        shows(self.page.locator(selector).first, text)


def shows(found: Locator, text: str) -> None:
    """Wait until an element has the text."""
    expect(found).to_contain_text(text, use_inner_text=True, timeout=DEADLINE_MS)


@pytest.fixture(scope="module")
def wide(chromium, file):
    tab = _Tab(chromium, file, viewport={"width": 1280, "height": 900}, color_scheme="light")
    yield tab
    tab.context.close()


def test_every_tab_draws_and_neither_asks_for_anything_nor_complains(wide):
    for tab, charts in (("curves", 4), ("judge", 3), ("time", 2)):
        wide.open(tab)
        wide.page.locator(".plot .main-svg").nth(charts - 1).wait_for(state="attached")
    assert [url for url in wide.requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert wide.complaints == []


def test_the_page_itself_forbids_requests(wide):
    refused = "fetch('http://127.0.0.1:9/').then(() => 'sent', (error) => error.message)"
    assert "Failed to fetch" in wide.page.evaluate(refused)
    assert any("Content Security Policy" in text for text in wide.complaints)
    wide.complaints.clear()
    wide.requests.clear()


def test_curves_of_both_runs_are_on_one_axis_with_stage_marks_and_can_be_hidden(wide):
    wide.open("curves")
    chart = wide.page.locator("figure:has(figcaption:text-is('reward/mean')) .plot")
    chart.scroll_into_view_if_needed()
    chart.locator(".main-svg").first.wait_for()
    assert chart.evaluate("plot => plot.data.map((trace) => trace.y.length)") == [6, 6]
    assert chart.evaluate("plot => plot.layout.annotations.map((mark) => mark.text)") == ["parts", "sparse"]
    wide.page.uncheck("input[aria-label='show second']")
    chart.locator(".main-svg").first.wait_for()
    assert chart.evaluate("plot => plot.data.length") == 1
    wide.page.check("input[aria-label='show second']")
    wide.page.click("button:text-is('time')")
    wide.has("table.config", "0.0001")
    wide.has("table.config", "0.0002")


def test_a_trace_is_colored_by_score_advantage_log_prob_and_gap_and_says_what_was_asked(wide):
    wide.open("traces")
    wide.page.select_option("label:has-text('Run') select", "0")
    wide.page.select_option("label:has-text('Step') select", "0")
    wide.page.locator("button.trace").first.click()
    shade = "spans => spans.map((span) => getComputedStyle(span).backgroundColor)"
    segments = wide.page.locator(".segment")
    shows(segments.first, FIRST)
    by_score = segments.evaluate_all(shade)
    wide.page.click("button:text-is('advantage')")
    assert [text.split("\n")[0][:5] for text in segments.all_inner_texts()] == ["0 · −", "1 · +"]
    assert segments.evaluate_all(shade) != by_score and len(set(by_score)) == 2
    wide.page.click("button:text-is('log-prob')")
    assert wide.page.locator(".token").count() > 8
    wide.page.locator(".token").first.hover()
    assert "log-prob -0.25" in wide.page.locator(".token").first.get_attribute("title")
    wide.page.click("button:text-is('trainer gap')")
    assert wide.page.locator(".token").nth(1).get_attribute("title").endswith(", trainer +0.5")
    first, second, third = wide.page.locator(".token").evaluate_all(shade)[:3]
    assert first == third != second
    assert "largest 0.5" in wide.page.locator("#trace .note", has_text="Mean distance").inner_text()
    wide.page.click("summary:has-text('segment 1')")
    words = wide.page.locator("#judged-1").inner_text()
    assert CANARY in words and "established" in words and "reaches the total" in words


def test_the_keyboard_reaches_steps_and_traces(wide):
    wide.open("traces")
    wide.page.select_option("label:has-text('Step') select", "0")
    wide.page.locator("button.trace").first.focus()
    wide.page.keyboard.press("ArrowDown")
    wide.has("button.trace[aria-current=true]", "sample 1")
    wide.page.keyboard.press("]")
    wide.has("article", "parts, step 2")
    wide.page.locator("#tab-traces").focus()
    wide.page.keyboard.press("ArrowRight")
    wide.page.locator("#tab-judge[aria-selected=true]").wait_for()


def test_a_disagreement_opens_the_traces_on_which_judge_and_verifier_disagree(wide):
    wide.open("judge")
    wide.page.locator(".links button").first.click()
    wide.page.wait_for_selector("article h2")
    assert {text.split("\n")[-2] for text in wide.texts("button.trace")} == {"wrong"}


def test_what_a_model_or_a_problem_says_stays_text(wide):
    wide.open("traces")
    wide.page.select_option("label:has-text('Run') select", "1")
    wide.page.locator("button.trace").first.click()
    wide.has("article h2", HOSTILE)
    wide.page.evaluate("document.querySelectorAll('article details').forEach((each) => { each.open = true; })")
    assert wide.page.locator("article").inner_text().count(HOSTILE) >= 2
    assert wide.page.evaluate("typeof hacked") == "undefined"
    assert wide.page.locator("main img, main b, main script").count() == 0
    assert [url for url in wide.requests if url.startswith("http")] == []


def test_a_narrow_dark_page_needs_no_sideways_scrolling(chromium, file):
    tab = _Tab(chromium, file, viewport={"width": 400, "height": 800}, color_scheme="dark")
    for name in ("curves", "traces", "judge", "time"):
        tab.open(name)
        tab.page.wait_for_selector("main > *")
        assert tab.page.evaluate("document.documentElement.scrollWidth") == 400, name
    background = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    assert max(tab.page.evaluate(background)) < 60
    tab.page.click("button:text-is('Dark or light')")
    assert min(tab.page.evaluate(background)) > 200
    assert tab.complaints == []
    tab.context.close()


def test_runs_without_a_step_or_without_a_score_are_shown_as_what_they_are(chromium, tmp_path):
    runs = [write_killed_run(tmp_path / "killed"), write_unscored_run(tmp_path / "unscored")]
    write_page(tmp_path / "page.html", PageReader(runs, references=True))
    tab = _Tab(chromium, tmp_path / "page.html", viewport={"width": 1280, "height": 900})
    for text in ("no step yet", "1 step"):
        tab.has(".runs", text)
    tab.open("curves")
    tab.page.fill("#metric-filter", "l")
    expect(tab.page.locator("text='no finite value'")).to_have_count(2, timeout=DEADLINE_MS)
    tab.open("traces")
    tab.has("main", "killed has no traces: its rollout log is empty.")
    tab.page.select_option("label:has-text('Run') select", "1")
    tab.has("main", "2 traces in 1 group.")
    tab.open("judge")
    tab.page.locator("text='no score'").nth(1).wait_for()
    tab.open("time")
    tab.has("main section .note", "No step is finished yet.")
    assert tab.complaints == []
    tab.context.close()


@pytest.fixture
def served(tmp_path):
    """The address of a served page of one run, and the run's directory."""
    run = write_run(tmp_path / "run")
    last = run / "journal" / "sparse" / "step-000003.parquet"
    kept = last.rename(tmp_path / "kept")
    command = [sys.executable, "-m", "exprl_megatron.cli", "report", run, "--serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        yield server.stdout.readline().split()[0], kept, last
        server.terminate()


def test_a_served_page_shows_a_step_that_the_run_leaves_while_it_is_open(chromium, served):
    address, kept, last = served
    tab = _Tab(chromium, address, viewport={"width": 1280, "height": 900})
    tab.open("traces")
    steps = tab.page.locator("label:has-text('Step') select option")
    assert not any("sparse, step 3" in text for text in steps.all_inner_texts())
    kept.rename(last)
    steps.filter(has_text="sparse, step 3").wait_for(state="attached")
    tab.page.select_option("label:has-text('Step') select", label=steps.filter(has_text="sparse, step 3").inner_text())
    tab.page.wait_for_selector("button.trace")
    assert tab.complaints == []
    assert {url.split("/")[2] for url in tab.requests} == {address.split("/")[2]}, "only its own server is asked"
    tab.context.close()
