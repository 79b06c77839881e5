"""`policy.precision` where a config leaves it out."""

import json

import pytest
import yaml
from pydantic import ValidationError

from exprl_megatron.config.load import check_config, load_config
from exprl_megatron.config.precision import PrecisionConfig
from exprl_megatron.launch.dry_run import print_dry_run
from exprl_megatron.planning.targets import find_config

CONFIGS = ("recipes/configs/demo.yaml", "recipes/configs/demo-smollm.yaml")


@pytest.fixture(params=["cuda", "cpu"])
def expected(request, monkeypatch):
    """What a machine computes in by default, once for either kind of machine."""
    monkeypatch.setattr("exprl_megatron.config.precision.uses_cuda", lambda: request.param == "cuda")
    return "bf16" if request.param == "cuda" else "fp32"


def test_the_default_follows_the_machine(expected):
    precision = PrecisionConfig()
    assert (precision.resolved().kind, precision.dtype, precision.fp8) == (expected, expected, False)
    assert PrecisionConfig(kind="fp8-tensorwise").resolved().kind == "fp8-tensorwise"


def test_a_config_that_is_only_read_is_left_open(expected):
    tree = {
        "directory": "d",
        "policy": {"model": "m"},
        "stages": [{"kind": "sft", "name": "a", "steps": 1, "examples": "e"}],
    }
    config = check_config(tree, "test")
    assert config.policy.precision.kind == "auto"
    assert config.with_precision().policy.precision.kind == expected
    # As a recipe writes it where it is submitted, and the job reads it on its own machine.
    assert check_config(json.loads(config.model_dump_json()), "again") == config


@pytest.mark.parametrize("path", CONFIGS)
def test_the_dry_run_shows_what_a_run_here_would_record(expected, path, capsys):
    print_dry_run(load_config(path))
    shown = yaml.safe_load(capsys.readouterr().out.partition("\n\n")[0])
    assert shown["policy"]["precision"]["kind"] == expected


def test_a_plan_is_for_gpus_wherever_it_is_made(expected):
    config, _ = find_config(CONFIGS[0], [])
    assert config.policy.precision.kind == "bf16"


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValidationError):
        PrecisionConfig(kind="fp64")
