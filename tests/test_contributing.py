"""The files and commands that CONTRIBUTING.md, the hooks and the workflows name exist."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def test_the_guide_names_files_that_exist():
    named = re.findall(r"`((?:exprl_megatron|tests|tools|docs|training|\.ci)/[\w./-]+)`", GUIDE)
    assert len(named) > 20
    missing = [name for name in named if not any((root / name).is_file() for root in (ROOT, ROOT / "exprl_megatron"))]
    assert missing == []


def test_the_guide_names_commands_that_exist():
    commands = [word for line in re.findall(r"\bmake ([\w -]+)", GUIDE) for word in line.split()[:2]]
    named = {word for word in commands if word in TARGETS or word.startswith(("test", "lint", "lock", "ratchet"))}
    assert {"setup", "lint", "types", "test-fast", "lock", "ratchet"} <= named <= TARGETS


def test_ci_checks_words_and_types_before_the_tests():
    lines = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert lines[-3:] == ["make lint", "make types", "exec make test"]


def test_hooks_run_scripts_that_exist():
    hooks = [
        hook
        for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
        for hook in repo["hooks"]
    ]
    assert {hook["id"] for hook in hooks} == {"ruff-check", "ruff-format", "words", "types"}
    scripts = [word for hook in hooks for word in hook["entry"].split() if word.startswith("tools/")]
    assert scripts and all((ROOT / script).is_file() for script in scripts)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_pinned_actions_and_runs_targets_that_exist(workflow):
    (job,) = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"].values()
    assert all(re.search(r"@v\d+\.\d+\.\d+$", step["uses"]) for step in job["steps"] if "uses" in step)
    runs = [step["run"] for step in job["steps"] if "run" in step]
    assert runs and all(run.split()[0] == "make" and run.split()[1] in TARGETS for run in runs)


def test_there_is_a_workflow_for_each_layer():
    assert [path.stem for path in WORKFLOWS] == ["fast", "lint", "slow", "te"]
