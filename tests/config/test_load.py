"""What a good config becomes, and the sentences that a bad one gets."""

import subprocess
import sys

import pytest
import yaml

from exprl_megatron.config.load import check_config, load_config
from exprl_megatron.config.renamed import RENAMED_KEYS, RENAMED_VALUES
from exprl_megatron.errors import UserError


def _tree():
    return {
        "directory": "out",
        "policy": {"model": "model", "max_tokens": 512, "layout": {"tp": 2}},
        "judge": {"model": "judge"},
        "stages": [
            {
                "kind": "exprl-outcome",
                "name": "priming",
                "steps": 5,
                "problems": {"source": "problems.jsonl"},
                "sampling": {"max_new_tokens": 128},
                "optimizer": {"betas": [0.9, 0.95]},
            },
            {
                "kind": "sparse-rl",
                "name": "sparse",
                "steps": 5,
                "problems": {"source": "problems.jsonl"},
                "sampling": {"max_new_tokens": 128},
            },
        ],
    }


def _file(tmp_path, tree):
    path = tmp_path / "run.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return path


def _complaints(tmp_path, tree, *overrides):
    with pytest.raises(UserError) as caught:
        load_config(_file(tmp_path, tree), overrides)
    return str(caught.value).splitlines()


def _only(tmp_path, tree, *overrides):
    (line,) = _complaints(tmp_path, tree, *overrides)
    return line


def test_a_good_config_is_loaded_with_defaults_and_tuples(tmp_path):
    config = load_config(_file(tmp_path, _tree()))
    assert config.policy.layout.world_size == 2
    assert config.stages[0].optimizer.betas == (0.9, 0.95)
    assert config.stages[1].loss.clip_high == 4.0
    assert check_config(config.model_dump(mode="json"), "again") == config


def test_overrides_reach_into_lists_and_keep_their_type(tmp_path):
    overrides = (
        "stages.0.steps=3",
        "stages.1.optimizer.lr=2e-4",
        "policy.layout.sequence_parallel=true",
        "stages.0.sampling.stop_token_ids=[2, 7]",
        "prompt.system=Think = hard.",
        "judge.server.port=null",
    )
    config = load_config(_file(tmp_path, _tree()), overrides)
    assert config.stages[0].steps == 3
    assert config.stages[1].optimizer.lr == 2e-4
    assert config.policy.layout.sequence_parallel is True
    assert config.stages[0].sampling.stop_token_ids == (2, 7)
    assert config.prompt.system == "Think = hard."
    assert config.judge.server.port is None


def test_a_file_overrides_the_one_that_it_extends(tmp_path):
    (tmp_path / "below.yaml").write_text(yaml.safe_dump(_tree() | {"seed": 5, "x-steps": 7}))
    above = {
        "extends": "below.yaml",
        "directory": "elsewhere",
        "policy": {"layout": {"tp": 4}},
        "stages": [_tree()["stages"][1] | {"steps": "${x-steps}"}],
    }
    config = load_config(_file(tmp_path, above), ["x-steps=9"])
    assert (config.seed, config.directory, config.policy.model) == (5, "elsewhere", "model")
    assert config.policy.layout.tp == 4
    assert [(stage.kind, stage.steps) for stage in config.stages] == [("sparse-rl", 9)]


def test_a_file_that_extends_itself_is_refused(tmp_path):
    (tmp_path / "below.yaml").write_text("extends: run.yaml\n")
    assert "extends itself" in _only(tmp_path, {"extends": "below.yaml"})


def test_a_file_that_extends_nothing_there_is_refused(tmp_path):
    assert "There is no config file" in _only(tmp_path, {"extends": "below.yaml"})


@pytest.mark.parametrize(
    ("override", "path", "near"),
    [
        ("directry=x", "directry", "directory"),
        ("policy.layout.tpp=2", "policy.layout.tpp", "tp"),
        ("stages.0.group_sise=4", "stages.0.group_sise", "group_size"),
        ("stages.1.loss.clip_hihg=4.0", "stages.1.loss.clip_hihg", "clip_high"),
        ("verifier.answer_deadline=4.0", "verifier.answer_deadline", "answer_deadline_s"),
        ("judge.server.prot=30000", "judge.server.prot", "port"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_name(tmp_path, override, path, near):
    line = _only(tmp_path, _tree(), override)
    assert f"unknown key {path}; did you mean '{near}'?" in line


def test_an_unknown_key_like_no_known_one_is_to_be_removed(tmp_path):
    assert "unknown key policy.zzzz; remove it." in _only(tmp_path, _tree(), "policy.zzzz=1")


def test_a_group_s_requests_are_a_matter_of_the_policys_servers(tmp_path):
    assert "set server.group_requests." in _only(tmp_path, _tree(), "judge.server.group_requests=true")
    assert load_config(_file(tmp_path, _tree()), ["server.group_requests=true"]).server.group_requests


@pytest.mark.parametrize(
    ("override", "old", "new"),
    [
        ("policy.starting_policy=server", "policy.starting_policy", "policy.ref_policy"),
        ("policy.initialise=random", "policy.initialise", "policy.initialize"),
        ("sync.hold=in_place", "sync.hold", "sync.pause_mode"),
        ("judge.place=policy", "judge.place", "judge.placement"),
    ],
)
def test_a_renamed_key_is_refused_with_its_new_name(tmp_path, override, old, new):
    assert f"{old} is now called {new}; rename the key." in _only(tmp_path, _tree(), override)
    assert RENAMED_KEYS[old] == new.rpartition(".")[2]
    value = override.partition("=")[2]
    assert "unknown key" not in "".join(_complaints(tmp_path, _tree(), f"{new}={value}", "seed=x"))


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [(key.rpartition(".")[2], *names) for key, values in RENAMED_VALUES.items() for names in values.items()],
)
def test_a_renamed_value_is_refused_with_its_new_name(tmp_path, key, old, new):
    tree = _tree()
    tree["stages"][0] |= {"kind": "exprl-process" if key == "overlong" else "exprl-outcome", key: old}
    assert f"stages.0.{key} is {old!r}, which is now called {new!r}; change the value." in _only(tmp_path, tree)
    tree["stages"][0][key] = new
    assert getattr(load_config(_file(tmp_path, tree)).stages[0], key) == new


def test_renamed_keys_of_stages_and_routes_are_refused_with_their_new_names(tmp_path):
    tree = _tree()
    tree["stages"][0] |= {"kind": "exprl-process", "unit": "prefix", "routes": {"code": {"unit": "trace"}}}
    complaints = "\n".join(_complaints(tmp_path, tree))
    assert "stages.0.unit is now called stages.0.granularity; rename the key." in complaints
    assert "stages.0.routes.code.unit is now called stages.0.routes.code.granularity; rename the key." in complaints


@pytest.mark.parametrize(
    ("override", "start"),
    [
        ("stages.0.steps=soon", "stages.0.steps is 'soon':"),
        ("stages.0.steps='3'", "stages.0.steps is '3':"),
        ("stages.0.steps=true", "stages.0.steps is True:"),
        ("stages.0.steps=2.5", "stages.0.steps is 2.5:"),
        ("stages.0.steps=0", "stages.0.steps is 0:"),
        ("policy.layout.sequence_parallel=1", "policy.layout.sequence_parallel is 1:"),
        ("policy.layout=2", "policy.layout is 2:"),
        ("policy.precision=fp64", "policy.precision.kind is 'fp64':"),
        ("stages.0.optimizer.lr=.nan", "stages.0.optimizer.lr is nan:"),
        ("stages.0.sampling.stop_token_ids.0=x", "stages.0.sampling.stop_token_ids.0 is 'x':"),
        ("directory=3", "directory is 3:"),
        ("stages=3", "stages is 3:"),
        ("stages.0.name=No Spaces", "stages.0.name is 'No Spaces':"),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_named_with_its_key(tmp_path, override, start):
    tree = _tree()
    tree["stages"][0]["sampling"]["stop_token_ids"] = [1]
    line = _only(tmp_path, tree, override)
    assert start in line
    assert line.endswith("; change the value.")


def test_every_violation_is_listed_at_once_each_in_one_line(tmp_path):
    tree = _tree()
    del tree["policy"]["model"]
    tree["polcy"] = 1
    tree["stages"][0]["steps"] = "many"
    tree["stages"][1]["problems"] = {}
    lines = _complaints(tmp_path, tree)
    expected = (
        "policy.model is missing",
        "unknown key polcy",
        "stages.0.steps is 'many'",
        "problems.source is missing",
    )
    assert len(lines) == len(expected)
    for part in expected:
        assert any(part in line for line in lines)


def test_pieces_that_do_not_fit_together_are_listed_at_once(tmp_path):
    tree = _tree()
    del tree["judge"]
    tree["policy"]["layout"] = {"vpp": 2}
    tree["stages"][1]["sampling"]["max_new_tokens"] = 512
    tree["stages"][1]["name"] = "priming"
    tree["prompt"] = {"user": "solve it"}
    tree["evaluation"] = {"problems": {"source": "x.jsonl"}, "samples": 4, "k": [1, 16]}
    lines = _complaints(tmp_path, tree)
    parts = ("needs a judge", "vpp is 2", "leaves no room", "given twice", "never shows the problem", "contains 16")
    assert len(lines) == len(parts)
    for part in parts:
        assert any(part in line for line in lines)


def test_unknown_keys_do_not_hide_what_contradicts_itself(tmp_path):
    tree = _tree()
    tree["seeed"] = 3
    tree["stages"][0]["stepps"] = 4
    tree["policy"]["layout"] = {"vpp": 2, "tpp": 2}
    tree["stages"][1]["name"] = "priming"
    lines = _complaints(tmp_path, tree)
    parts = ("unknown key seeed", "unknown key stages.0.stepps", "unknown key policy.layout.tpp", "vpp is 2", "twice")
    assert len(lines) == len(parts)
    for part in parts:
        assert any(part in line for line in lines)


def test_an_unknown_stage_is_refused_with_the_known_ones(tmp_path):
    line = _only(tmp_path, _tree(), "stages.0.kind=exprl")
    kinds = "exprl-outcome, exprl-process, sparse-rl, self-distill, sft, or to module:Class of your own."
    assert f"stages.0.kind is 'exprl'; set it to one of {kinds}" in line
    tree = _tree()
    del tree["stages"][0]["kind"]
    assert "stages.0.kind is missing" in _only(tmp_path, tree)


@pytest.mark.parametrize(
    ("placement", "sync", "part"),
    [
        ("colocated", {"transport": "direct"}, "sync.transport is direct, which has no group"),
        ("colocated", {"transport": "broadcast"}, "sync.transport is broadcast, which has no group"),
        ("separate", {"transport": "direct", "fp8": True}, "but sync.fp8 is true"),
    ],
)
def test_a_transport_that_does_not_go_with_the_rest_is_refused(tmp_path, placement, sync, part):
    (line,) = _complaints(tmp_path, _tree() | {"placement": {"kind": placement}, "sync": sync})
    assert part in line


def test_contradictions_within_a_route_and_of_process_rewards_are_found(tmp_path):
    tree = _tree()
    routes = {"code": {"granularity": "prefix", "estimator": "outcome"}}
    tree["stages"][0] |= {"kind": "exprl-process", "updates_per_step": 2, "routes": routes}
    lines = _complaints(tmp_path, tree)
    assert len(lines) == 2
    assert "updates_per_step is 2" in lines[0]
    assert "`outcome` needs `trace`" in lines[1]


def _ahead(tmp_path, stage, correction="truncated"):
    tree = _tree()
    tree["stages"][0] |= {"max_staleness": 2, "loss": {"correction": {"kind": correction}}} | stage
    return _complaints(tmp_path, tree)


def test_sampling_ahead_without_a_correction_is_refused(tmp_path):
    (line,) = _ahead(tmp_path, {}, correction="none")
    assert "stage priming: max_staleness is 2, but nothing corrects" in line
    assert "set loss.correction.kind to truncated or masked" in line
    for kind in ("truncated", "masked"):
        overrides = ("stages.0.max_staleness=2", f"stages.0.loss.correction.kind={kind}")
        assert load_config(_file(tmp_path, _tree()), overrides).stages[0].max_staleness == 2


@pytest.mark.parametrize(
    ("stage", "part"),
    [
        ({"kind": "exprl-process"}, "need strictly on-policy traces, but max_staleness is 2"),
        ({"kind": "sparse-rl", "dynamic_sampling": 3}, "dynamic_sampling chooses a step's problems by its traces"),
        ({"kind": "self-distill"}, "no ratio to correct by; set max_staleness to 0"),
    ],
)
def test_stages_that_cannot_learn_from_older_weights_refuse_to_sample_ahead(tmp_path, stage, part):
    (line,) = _ahead(tmp_path, stage)
    assert part in line


def test_process_rewards_learn_off_policy_where_configured_so(tmp_path):
    tree = _tree()
    correction = {"correction": {"kind": "masked"}}
    tree["stages"][0] |= {"kind": "exprl-process", "max_staleness": 1, "allow_off_policy": True, "loss": correction}
    assert load_config(_file(tmp_path, tree)).stages[0].max_staleness == 1


def test_traces_held_in_place_and_a_bound_on_the_gap_to_the_sampler_contradict_each_other(tmp_path):
    overrides = ["sync.pause_mode=in_place", "sync.max_log_prob_gap=1e-4"]
    assert load_config(_file(tmp_path, _tree()), overrides).sync.pause_mode == "in_place"
    overrides += ["stages.1.max_staleness=1", "stages.1.loss.correction.kind=masked"]
    assert "set it to auto or null, or pause_mode to retract" in _only(tmp_path, _tree(), *overrides)
    overrides[1] = "sync.max_log_prob_gap=auto"
    assert not load_config(_file(tmp_path, _tree()), overrides).compares_log_probs


@pytest.mark.parametrize("value", ["0", "-1e-4", ".inf", ".nan", "default"])
def test_a_bound_on_the_gap_to_the_sampler_is_a_positive_number(tmp_path, value):
    assert "sync.max_log_prob_gap" in "\n".join(_complaints(tmp_path, _tree(), f"sync.max_log_prob_gap={value}"))


def test_a_teacher_that_never_sees_the_reference_is_refused(tmp_path):
    tree = _tree()
    tree["stages"][0] |= {"kind": "self-distill", "teacher_prompt": {"user": "{problem}"}}
    assert "never shows the reference" in _only(tmp_path, tree)


@pytest.mark.parametrize("source", [{}, {"examples": "a.jsonl", "problems": {"source": "b.jsonl"}}])
def test_supervised_learning_wants_exactly_one_source(tmp_path, source):
    tree = _tree()
    tree["stages"] = [{"kind": "sft", "name": "sft", "steps": 1} | source]
    assert "either `examples` or `problems`" in _only(tmp_path, tree)


def test_an_empty_list_of_stages_is_refused(tmp_path):
    assert "stages is empty" in _only(tmp_path, _tree(), "stages=[]")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("policy: [1,\nb: }\n", "is not YAML: line 2, column"),
        ("a: 1\na: 2\n", "duplicate key a"),
        ("- 1\n- 2\n", "is not a mapping"),
        ("directory: ${nowhere}\n", "run.yaml has no nowhere, to which a ${nowhere} refers; correct the name."),
    ],
)
def test_a_file_that_is_not_a_config_gets_one_sentence(tmp_path, text, part):
    assert part in _only(tmp_path, text)


def test_a_file_that_is_not_text_gets_one_sentence(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match=r"is not text in UTF-8 \(byte 0\)"):
        load_config(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"There is no config file .*nowhere\.yaml; give the path"):
        load_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("override", ["stages.0.steps", "=3", "stages.x.steps=3", "stages.9.steps=3", "seed=[1"])
def test_an_override_that_fits_nowhere_is_quoted(tmp_path, override):
    assert f"The override {override!r}" in _only(tmp_path, _tree(), override)


@pytest.mark.parametrize("module", ["exprl_megatron.config.load", "exprl_megatron.problems.problem"])
def test_importing_needs_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("argument", ["--api-key", "--admin-api-key=K"])
def test_a_key_of_ones_own_for_the_runs_servers_is_refused(argument):
    for servers in (
        {"server": {"extra_args": [argument, "K"]}},
        {"judge": {"model": "j", "server": {"extra_args": [argument]}}},
    ):
        with pytest.raises(UserError, match=r"extra_args hold --(admin-)?api-key, but the run makes the key"):
            check_config(_tree() | servers, "test")


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "OPENAI_API_KEY", "WANDB_APIKEY", "my_password", "AWS_SECRET_ACCESS_KEY", "KEY"]
)
def test_a_secret_of_the_environment_is_not_written_into_the_config(tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "hf_FAKE")
    for tree in (
        _tree() | {"prompt": {"system": f"${{oc.env:{name}}}"}},
        _tree() | {"x-a": f"${{oc.env:{name}}}", "prompt": {"system": "${x-a}"}},
        _tree() | {"x-a": name, "prompt": {"system": "${oc.env:${x-a},none}"}},
    ):
        with pytest.raises(UserError, match=rf"oc\.env:{name}.* would write a secret into the config") as error:
            load_config(_file(tmp_path, tree))
        assert "hf_FAKE" not in str(error.value) and "interpolation" not in str(error.value)


def test_other_variables_of_the_environment_may_be_referred_to(tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/monkey")
    tree = _tree() | {"directory": "${oc.env:SCRATCH}/run", "prompt": {"system": "${oc.env:EXPRL_UNSET,Think.}"}}
    config = load_config(_file(tmp_path, tree))
    assert (config.directory, config.prompt.system) == ("/scratch/monkey/run", "Think.")


@pytest.mark.parametrize("name", ["../../etc", "a/b", "/etc", "..", ".", "", "prime\n", "Prime", "-x", "a b"])
def test_a_stage_whose_name_is_not_a_file_name_is_refused(tmp_path, name):
    """Files and directories of the run have it."""
    tree = _tree()
    tree["stages"][0]["name"] = name
    with pytest.raises(UserError, match=r"stages\.0.*name"):
        check_config(tree, "test")
