"""Overrides that name stages, short forms, and sentences without the words of the library that reads them."""

import pytest
import yaml

from exprl_megatron.config.load import load_config
from exprl_megatron.errors import UserError


@pytest.fixture
def load(tmp_path):
    """`load(*overrides, **changes of the second stage)` of a config with two stages."""

    def loaded(*overrides, **changes):
        stage = {"steps": 5, "sampling": {"max_new_tokens": 128}, "problems": {"source": "a.jsonl"}}
        tree = {
            "directory": "out",
            "policy": {"model": "model", "max_tokens": 512},
            "judge": {"model": "judge"},
            "stages": [
                {"kind": "exprl-outcome", "name": "prime", "optimizer": {"betas": [0.9, 0.95]}, **stage},
                {"kind": "sparse-rl", **stage, **changes},
            ],
        }
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(tree))
        return load_config(path, overrides)

    return loaded


@pytest.mark.parametrize("key", ["stages.prime.steps", "stages[prime].steps", "stages.0.steps", "stages[0].steps"])
def test_a_stage_is_addressed_by_name_or_number(load, key):
    assert [stage.steps for stage in load(f"{key}=7").stages] == [7, 5]


def test_a_stage_without_a_name_has_that_of_its_kind(load):
    config = load("stages.sparse-rl.steps=7")
    assert [(stage.name, stage.steps) for stage in config.stages] == [("prime", 5), ("sparse-rl", 7)]
    with pytest.raises(UserError, match="the name prime is given twice"):
        load(name="prime")


def test_problems_may_be_a_file_alone(load):
    assert load(problems="b.jsonl").stages[1].problems.source == "b.jsonl"
    assert load("stages.prime.problems=c.jsonl").stages[0].problems.source == "c.jsonl"
    assert load("evaluation.problems=d.jsonl").evaluation.problems.source == "d.jsonl"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "stages.5.steps=1",
            "there is no stage 5; the stages are prime (0), sparse-rl (1).",
        ),
        (
            "stages.prim.steps=1",
            "there is no stage prim; the stages are prime (0), sparse-rl (1).",
        ),
        (
            "stages[2]=1",
            "there is no stage 2; the stages are prime (0), sparse-rl (1).",
        ),
        (
            "policy.model.path=x",
            "policy.model is 'model' and has no keys; set policy.model itself.",
        ),
        (
            "stages.prime.optimizer.betas.2=0.9",
            "stages.0.optimizer.betas is a list of 2 and has no 2; count from 0.",
        ),
        ("directory=${nope}", "FILE has no nope, to which a ${nope} refers; correct the name."),
        ("directory=${policy.nope}", "FILE has no policy.nope, to which a ${policy.nope} refers; correct the name."),
    ],
)
def test_what_fits_nowhere_is_refused_in_plain_words(load, tmp_path, override, sentence):
    with pytest.raises(UserError) as refused:
        load(override)
    nowhere = "" if "$" in override else f"The override {override!r} fits nowhere in FILE: "
    assert str(refused.value).replace(str(tmp_path / "run.yaml"), "FILE") == nowhere + sentence
