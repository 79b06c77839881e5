"""What the commands say about a directory, a path or a value that they cannot use."""

import sys

import pytest

from exprl_megatron import cli
from exprl_megatron.errors import UserError
from exprl_megatron.inspection.judgement_list import score_range
from exprl_megatron.judging.prompt import load_prompt
from exprl_megatron.reporting.picture_file import check_picture


def said(monkeypatch, capsys, *words) -> str:
    """The one line on stderr of a command that ends with status 2."""
    monkeypatch.setattr(sys, "argv", ["exprl", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    "words",
    [
        ("show",),
        ("report", "--out", "x.html"),
        ("judgement", "--run"),
        ("judgement", "abcdef", "--run"),
        ("waterfall",),
        ("leak-scan",),
        ("plan", "--against"),
    ],
)
def test_every_reader_says_the_same_about_a_directory_without_a_run(monkeypatch, capsys, tmp_path, words):
    place = [words[0], tmp_path, *words[1:]] if words[-1] == "x.html" else [*words, tmp_path]
    assert said(monkeypatch, capsys, *place) == f"exprl: There is no run in {tmp_path}; give the directory of one."


@pytest.mark.parametrize(
    ("command", "module"),
    [
        (("show",), "show"),
        (("report", "--out", "x.html"), "report_page.page_model"),
        (("judgement", "--run"), "stored_judgements"),
        (("leak-scan",), "leak_scan"),
    ],
)
def test_a_directory_without_a_run_is_refused_before_what_reads_runs_is_imported(
    monkeypatch, capsys, tmp_path, command, module
):
    """The module imports torch, which takes seconds; None in sys.modules makes its import fail."""
    monkeypatch.setitem(sys.modules, f"exprl_megatron.inspection.{module}", None)
    words = [command[0], tmp_path, *command[1:]] if command[0] == "report" else [*command, tmp_path]
    assert "There is no run in" in said(monkeypatch, capsys, *words)


def test_a_picture_of_an_unknown_format_is_refused_before_anything_is_read(monkeypatch, capsys, tmp_path):
    for name in ("steps.xyz", "steps"):
        text = said(monkeypatch, capsys, "waterfall", tmp_path, "--picture", name)
        assert text == f"exprl: The picture {name} has no known format; let its name end in .png, .svg, .pdf."
    check_picture(tmp_path / "steps.PNG")


@pytest.mark.parametrize(("below", "reason"), [("", "File exists"), ("deeper", "Not a directory")])
def test_a_path_through_a_file_is_one_sentence(monkeypatch, capsys, tmp_path, below, reason):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr("exprl_megatron.commands.doctor.examine", lambda: (file / below / "x").parent.mkdir())
    assert f"{reason}); choose" in said(monkeypatch, capsys, "doctor")


def test_the_target_of_doctor_is_a_config_or_a_recipe(monkeypatch, capsys):
    monkeypatch.setattr("exprl_megatron.commands.doctor.examine", list)
    assert "nothing-like-it is neither a config file nor a recipe" in said(
        monkeypatch, capsys, "doctor", "nothing-like-it"
    )


def test_a_range_of_scores_has_its_lower_bound_first():
    with pytest.raises(UserError, match="give the lower bound first"):
        score_range("0.9:0.2")


def test_a_judge_prompt_is_refused_with_the_nearest_name_or_one_sentence():
    with pytest.raises(UserError, match=r"did you mean math-trace\?"):
        load_prompt("math-trac")
    with pytest.raises(UserError) as refused:
        load_prompt("zzzz")
    assert len(str(refused.value)) < 250
