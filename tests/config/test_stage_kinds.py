"""Stages of the user's own in a config: their bases, names, and what contradicts itself."""

import json

import pytest

from exprl_megatron.config.load import check_config
from exprl_megatron.config.stages import ExprlOutcomeStage, ExprlProcessStage, SparseRlStage
from exprl_megatron.errors import UserError

SPARSE = {"kind": "sparse-rl", "name": "later", "steps": 1, "problems": "x"}


def tree(*more, **stage):
    custom = {"kind": "my.stages:KeepEasy", "steps": 3, "problems": "x"} | stage
    return {"directory": "d", "policy": {"model": "m"}, "judge": {"model": "j"}, "stages": [custom, *more]}


@pytest.mark.parametrize(
    ("base", "cls"),
    [("sparse-rl", SparseRlStage), ("exprl-outcome", ExprlOutcomeStage), ("exprl-process", ExprlProcessStage)],
)
def test_a_stage_has_the_settings_of_its_base_and_is_read_back_as_it_was(base, cls):
    config = check_config(tree(base=base, settings={"low": [0.1, {"a": None}]}), "test")
    (stage,) = config.stages
    assert isinstance(stage, cls) and stage.base == base and stage.name == "keep-easy"
    assert check_config(json.loads(config.model_dump_json()), "again") == config


def test_without_a_base_it_is_sparse_rl_with_its_loss():
    (stage,) = check_config(tree(), "test").stages
    assert isinstance(stage, SparseRlStage) and stage.loss.kl_coefficient == 0


@pytest.mark.parametrize(
    ("kind", "name"),
    [("a.b:RejectionSampling", "rejection-sampling"), ("a:keep_easy", "keep-easy"), ("a:B.SFT2", "sft2")],
)
def test_its_name_is_made_from_that_of_the_class(kind, name):
    assert check_config(tree(kind=kind), "test").stages[0].name == name


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"base": "sft"}, "stages.0.base is 'sft'; set it to one of sparse-rl, exprl-outcome, exprl-process"),
        ({"base": 3}, "stages.0.base is 3; set it to one of"),
        ({"kind": "nope"}, "stages.0.kind is 'nope'; set it to one of .*sft, or to module:Class of your own"),
        ({"stps": 3}, "unknown key stages.0.stps; did you mean 'steps'"),
        ({"base": "exprl-outcome", "rewrd": []}, "unknown key stages.0.rewrd; did you mean 'reward'"),
        ({"settings": 3}, "stages.0.settings is 3"),
        ({"objective": "supervised", "loss": {"clip_low": 0.1}}, "objective is supervised, which has no ratio"),
        ({"objective": "supervised", "max_staleness": 1}, "supervised, which nothing corrects"),
        ({"problems_from": "keep-easy"}, "the stages of your own before it are none"),
        ({"group_size": 1}, "group_size is 1, but advantage"),
    ],
)
def test_what_is_wrong_is_one_sentence(stage, said):
    with pytest.raises(UserError, match=said):
        check_config(tree(**stage), "test")


def test_problems_come_from_an_earlier_stage_of_ones_own():
    assert check_config(tree(SPARSE | {"problems_from": "keep-easy"}), "test").stages[1].problems_from == "keep-easy"
    with pytest.raises(UserError, match=r"stage later: problems_from is 'easy', but .* before it are keep-easy"):
        check_config(tree(SPARSE | {"problems_from": "easy"}), "test")
    with pytest.raises(UserError, match=r"stage later: .* debug\.only is sampling, where no stage keeps problems"):
        check_config(tree(SPARSE | {"problems_from": "keep-easy"}) | {"debug": {"only": "sampling"}}, "test")
