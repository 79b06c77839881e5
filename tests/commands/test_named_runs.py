"""`exprl plan` and `exprl doctor` take a recipe by its name."""

import json
from pathlib import Path

import pytest

from exprl_megatron.commands import doctor
from exprl_megatron.commands.named_runs import is_recipe, recipe_names
from exprl_megatron.commands.run_needs import needs_of
from recipes.catalog import MODELS

ROOT = Path(__file__).parents[2]


def test_the_names_that_need_no_import_are_those_of_the_catalog():
    assert recipe_names() == sorted(MODELS)
    assert is_recipe("llama3p3_70b/sparse_rl")
    assert not any(map(is_recipe, ("common", "llama3p3", "llama-3.3-70b", "a.yaml", "../recipes/miniature")))


@pytest.fixture(autouse=True)
def _in_the_clone(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_a_recipe_is_planned_with_the_stage_that_is_named(command_line):
    status, printed, _ = command_line("plan", "qwen3_4b/sparse_rl", "--json", "--top", 1)
    assert status == 0
    assert json.loads(printed)["workload"]["stage"] == "sparse"


def test_the_doctor_says_what_a_recipe_lacks_here(monkeypatch, command_line):
    assert all(finding.ok for finding in needs_of("miniature"))
    # What the machine has is another test's.
    monkeypatch.setattr(doctor, "examine", list)
    status, printed, told = command_line("doctor", "llama3p3_70b", "--json")
    model = json.loads(printed)["findings"][0]
    assert model == {
        "part": "run: policy.model",
        "ok": False,
        "found": "models/Llama-3.3-70B-Instruct has no config.json",
        "prevents": "this run",
    }
    assert status == 1 and "run: policy.model, " in told


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("llama3p3_70", "There is a recipe llama3p3_70b."),
        ("qwen3_4b/sparse", "There is no recipe sparse of qwen3_4b; did you mean sparse_rl? models are miniature, "),
    ],
)
def test_a_name_that_is_nearly_a_recipe_is_refused_with_the_recipe(command_line, name, sentence):
    status, _, told = command_line("plan", name)
    assert status == 2 and sentence in told
