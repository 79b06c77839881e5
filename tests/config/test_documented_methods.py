"""The settings that the documentation gives for each method are a config."""

from pathlib import Path

import pytest
import yaml

from exprl_megatron.config.load import check_config

DOCUMENT = Path(__file__).parents[2] / "docs" / "algorithms.md"
METHODS = yaml.safe_load(DOCUMENT.read_text(encoding="utf-8").split("```yaml")[1].split("```")[0])


def stage(settings):
    shared = {"kind": "sparse-rl", "name": "a", "steps": 1, "problems": {"source": "x"}}
    tree = {"directory": "d", "policy": {"model": "m"}, "stages": [shared | settings]}
    return check_config(tree, "test").stages[0]


@pytest.mark.parametrize("method", METHODS)
def test_a_methods_settings_are_a_stage(method):
    assert stage(METHODS[method]).advantage == METHODS[method]["advantage"]


def test_the_second_stage_is_the_default():
    assert stage(METHODS["second-stage"]) == stage({})
