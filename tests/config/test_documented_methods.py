"""The settings that the documentation gives for each method are a config, and the same method in each kind of stage."""

import re
from pathlib import Path

import pytest
import yaml

from exprl_megatron.config.load import check_config
from exprl_megatron.config.stages import ExprlOutcomeStage, SparseRlStage

SECTION = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text(encoding="utf-8").split("## Methods as")[1]
METHODS = yaml.safe_load(SECTION.split("```yaml")[1].split("```")[0])
CLASSES = {"sparse-rl": SparseRlStage, "exprl-outcome": ExprlOutcomeStage}
KINDS = [kind for kind in CLASSES if f"`{kind}`" in SECTION.split("```yaml")[0]]
ONLY_SPARSE = {"dynamic_sampling"}


def of_kind(settings, kind):
    """What the documentation says that a stage of `kind` takes of `settings`."""
    return settings if kind == "sparse-rl" else {k: v for k, v in settings.items() if k not in ONLY_SPARSE}


def stage(settings, kind):
    shared = {"kind": kind, "name": "a", "steps": 1, "problems": {"source": "x"}}
    stages = [shared | of_kind(settings, kind)]
    tree = {"directory": "d", "policy": {"model": "m"}, "judge": {"model": "j"}, "stages": stages}
    return check_config(tree, "test").stages[0]


def leaves(tree, prefix=""):
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in leaves(value, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): tree}


def test_the_section_names_the_kinds_of_stage_that_have_one_score_a_trace():
    assert set(KINDS) == set(CLASSES)
    assert set(re.findall(r"has no `(\w+)`", SECTION)) == ONLY_SPARSE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_a_methods_settings_are_those_of_the_stage(method, kind):
    found = leaves(stage(METHODS[method], kind).model_dump(mode="json"))
    given = leaves(of_kind(METHODS[method], kind))
    assert given and {key: found[key] for key in given} == given


@pytest.mark.parametrize("method", METHODS)
def test_both_kinds_of_stage_then_minimize_the_same(method):
    first, second = (stage(METHODS[method], kind) for kind in KINDS)
    assert first.loss.model_dump() == second.loss.model_dump()
    assert (first.advantage, first.overlong) == (second.advantage, second.overlong)
    assert first.updates_per_step == second.updates_per_step


def test_the_second_stage_is_the_default():
    assert stage(METHODS["second-stage"], "sparse-rl") == stage({}, "sparse-rl")
