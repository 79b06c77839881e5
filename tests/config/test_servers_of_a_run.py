"""Which servers a run needs, and with which settings they start."""

import pytest

from exprl_megatron.config.load import check_config

SHARED = {"problems": {"source": "p"}, "steps": 1}
KL = {"loss": {"kl_coefficient": 0.1}}


def config(*stages, **changes):
    tree = {"directory": "d", "policy": {"model": "m"}, "judge": {"model": "j"}}
    stages = [SHARED | {"kind": "sparse-rl", "name": f"s{i}"} | stage for i, stage in enumerate(stages)]
    return check_config(tree | {"stages": stages} | changes, "test")


def test_the_reference_policys_server_is_one_on_the_port_behind_the_sampling_servers():
    with_ports = config(KL, server={"count": 3, "port": 7000, "tp": 2, "max_total_tokens": 99})
    assert with_ports.ref_server == with_ports.server.model_copy(update={"count": 1, "port": 7003})
    assert config(KL).ref_server.port is None


@pytest.mark.parametrize(
    ("ref_policy", "stage", "wanted"), [("server", KL, True), ("server", {}, False), ("host", KL, False)]
)
def test_it_is_wanted_where_a_stage_needs_the_reference_policy_and_the_config_asks_for_a_server(
    ref_policy, stage, wanted
):
    assert config(stage, policy={"model": "m", "ref_policy": ref_policy}).has_ref_server == wanted


JUDGED = {"kind": "exprl-outcome"}
SFT = {"kind": "sft", "problems": None, "examples": "e.jsonl"}
EVALUATION = {"evaluation": {"problems": {"source": "h"}, "samples": 1, "k": [1]}}
LEARNING = {"debug": {"only": "learning", "rollouts": "other"}}


@pytest.mark.parametrize(
    ("stage", "changes", "sampling", "judge", "evaluation"),
    [
        ({}, {}, True, False, False),
        (JUDGED, {}, True, True, False),
        (JUDGED, EVALUATION, True, True, True),
        (JUDGED, LEARNING | EVALUATION, False, False, False),
        (SFT, {}, False, False, False),
        (SFT, EVALUATION, True, False, True),
    ],
)
def test_servers_are_needed_by_what_samples_and_the_judge_by_what_it_grades(
    stage, changes, sampling, judge, evaluation
):
    made = config(stage, **changes)
    assert (made.needs_sampling_servers, made.needs_judge, made.has_evaluation) == (sampling, judge, evaluation)


@pytest.mark.parametrize("given", [{"mem_fraction_static": 0.6}, {"extra_args": ["--mem-fraction-static=0.6"]}])
def test_servers_that_share_gpus_with_the_trainer_leave_it_memory_unless_the_config_says_how_much(given):
    colocated = {"placement": {"kind": "colocated"}, "sync": {"transport": "handles"}}
    assert config({}, **colocated).sampling_server.mem_fraction_static == 0.75
    assert config({}).sampling_server.mem_fraction_static is None
    settled = config({}, server=given, **colocated)
    assert settled.sampling_server == settled.server and settled.server.memory_share == 0.6


def test_each_set_of_problems_leaves_room_for_the_longest_response_that_any_stage_samples_of_it():
    stages = [{"sampling": {"max_new_tokens": tokens}} for tokens in (64, 256, 128)]
    made = config(*stages, **EVALUATION, policy={"model": "m", "max_tokens": 4096})
    found = {problems.source: sampling.max_new_tokens for problems, sampling in made.problem_sets().items()}
    assert found == {"p": 256, "h": 1024}


def test_evaluations_are_due_every_n_steps_but_not_before_the_first():
    made = config({}, evaluation=EVALUATION["evaluation"] | {"every_steps": 2}).evaluation
    assert [step for step in range(6) if made.is_due(step)] == [2, 4]


@pytest.mark.parametrize(("over_sampling", "drawn"), [(1.0, 5), (1.1, 6), (1.5, 8)])
def test_over_sampling_draws_at_least_so_many_problems(over_sampling, drawn):
    assert config({"over_sampling": over_sampling}).stages[0].prompts_for(5) == drawn
