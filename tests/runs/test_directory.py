import os
import stat
import subprocess
import sys

import pytest
import yaml

from exprl_megatron.config.load import check_config
from exprl_megatron.errors import UserError
from exprl_megatron.judging.prompt import load_prompt, prompt_set_hash
from exprl_megatron.runs.directory import RunDirectory, read_config


def started(directory: RunDirectory) -> RunDirectory:
    """The directory of a run that has taken a step."""
    directory.claim(config(directory.root), resume=False).release()
    directory.metrics.write_text('{"step": 1}\n')
    return directory


def config(directory, **changes):
    tree = {
        "directory": str(directory),
        "policy": {"model": "m"},
        "stages": [{"kind": "sft", "name": "a", "steps": 3, "examples": "e.jsonl"}],
    }
    return check_config(tree | changes, "test")


def test_a_directory_that_holds_a_run_is_refused_and_left_alone(tmp_path):
    directory = started(RunDirectory(tmp_path / "run"))
    before = directory.config.read_bytes()
    with pytest.raises(UserError, match="already holds a run; continue with it by --resume"):
        directory.claim(config(tmp_path / "run", seed=5), resume=False)
    assert directory.config.read_bytes() == before


def test_a_directory_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        RunDirectory(tmp_path).claim(config(tmp_path), resume=False)


def test_resuming_needs_a_run(tmp_path):
    with pytest.raises(UserError, match="no run in"):
        RunDirectory(tmp_path / "new").claim(config(tmp_path / "new"), resume=True)


def test_a_run_of_an_earlier_version_is_read_and_resumed_under_todays_names_of_keys(tmp_path):
    sampled = {"steps": 3, "problems": {"source": "p.jsonl"}, "problems_per_step": 2, "group_size": 2}
    routes = {"math": {"granularity": "segment", "estimator": "delta"}}
    stage = sampled | {"kind": "exprl-process", "name": "a", "granularity": "prefix", "routes": routes}
    stage["overlong"] = "penalize"
    now = {"judge": {"model": "j", "placement": "own"}, "sync": {"pause_mode": "retract"}, "stages": [stage]}
    now["policy"] = {"model": "m", "ref_policy": "host"}
    directory = RunDirectory(tmp_path / "run")
    directory.claim(config(directory.root, **now), resume=False).release()
    directory.metrics.write_text('{"step": 1}\n')
    before, tree = read_config(directory), yaml.safe_load(directory.config.read_text())
    (stage,) = tree["stages"]
    for section, key, old in [
        (tree["policy"], "ref_policy", "starting_policy"),
        (tree["policy"], "initialize", "initialise"),
        (tree["sync"], "pause_mode", "hold"),
        (tree["judge"], "placement", "place"),
        (stage, "granularity", "unit"),
        (stage["routes"]["math"], "granularity", "unit"),
    ]:
        section[old] = section.pop(key)
    stage["overlong"] = "penalise"
    directory.config.write_text(yaml.safe_dump(tree))
    assert read_config(directory) == before
    directory.claim(config(directory.root, **now), resume=True).release()


def test_resuming_with_another_config_names_the_changed_keys(tmp_path):
    directory = started(RunDirectory(tmp_path / "run"))
    changed = config(tmp_path / "run", seed=5, policy={"model": "other"})
    with pytest.raises(UserError, match=r"other values of policy\.model \(.*\), seed \(decides"):
        directory.claim(changed, resume=True)


def test_a_resumed_run_may_take_another_layout(tmp_path):
    directory = started(RunDirectory(tmp_path / "run"))
    directory.claim(config(tmp_path / "run", policy={"model": "m", "layout": {"tp": 2}}), resume=True).release()


def test_a_run_that_was_asked_to_stop_is_not_asked_so_again_when_it_is_resumed(tmp_path):
    directory = started(RunDirectory(tmp_path / "run"))
    directory.stop_request.touch()
    directory.claim(config(tmp_path / "run"), resume=True).release()
    assert not directory.stop_request.exists()


def test_a_directory_is_claimed_once(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    claim = directory.claim(config(tmp_path / "run"), resume=False)
    with pytest.raises(UserError, match="Another process is running"):
        directory.claim(config(tmp_path / "run"), resume=True)
    claim.release()
    directory.claim(config(tmp_path / "run"), resume=True).release()


def test_a_run_that_ended_before_its_first_step_does_not_block_the_directory(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.claim(config(tmp_path / "run"), resume=False).release()
    (directory.logs / "policy-0.log").write_text("an old attempt")
    directory.claim(config(tmp_path / "run", seed=5), resume=False).release()
    assert read_config(directory).seed == 5
    assert not any(directory.logs.iterdir())


def test_a_resume_after_an_update_of_the_shipped_prompts_names_the_settings_that_keep_the_earlier_ones(tmp_path):
    root = tmp_path / "run"
    directory, judge = RunDirectory(root), {"model": "j", "rubric": {"kind": "checkpoints"}}
    builder, builder_then = load_prompt("rubric-builder", shows="reference").version, "aa123fde4f6df596"
    first = prompt_set_hash("upstream")
    recorded = {"judge.shipped_prompts": first, "judge.rubric.prompt": builder_then}
    directory.claim(config(root, judge=judge), resume=False, contents=recorded).release()
    directory.metrics.write_text('{"step": 1}\n')
    now = {"judge.shipped_prompts": prompt_set_hash(), "judge.rubric.prompt": builder}
    with pytest.raises(UserError) as caught:
        directory.claim(config(root, judge=judge), resume=True, contents=now)
    named = f"resume it with judge.rubric.prompt={builder_then} judge.shipped_prompts={first} "
    assert named in str(caught.value)
    assert load_prompt(builder_then, shows="reference").version == builder_then
    with_them = {"shipped_prompts": first, "rubric": {"kind": "checkpoints", "prompt": builder_then}}
    directory.claim(config(root, judge=judge | with_them), resume=True, contents=recorded).release()
    with pytest.raises(UserError, match=r"other values of .*judge\.shipped_prompts"):
        directory.inputs.unlink()
        directory.claim(config(root, judge=judge), resume=True)


def test_inputs_that_have_changed_between_stop_and_resume_are_named(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    contents = {"policy.model": "1", "stages.0.examples": "2"}
    directory.claim(config(tmp_path / "run"), False, contents).release()
    directory.metrics.write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"The contents of stages\.0\.examples are others than when the run in"):
        directory.claim(config(tmp_path / "run"), True, contents | {"stages.0.examples": "3"})
    moved = config(tmp_path / "run", policy={"model": "elsewhere/m"})
    directory.claim(moved, True, contents).release()
    assert read_config(directory).policy.model == "elsewhere/m"
    directory.inputs.write_text("{")
    with pytest.raises(UserError, match=r"inputs\.json is damaged .*; delete it"):
        directory.claim(moved, True, contents)


def on(machine, monkeypatch):
    """Let this machine compute on CUDA, or on the CPU."""
    monkeypatch.setattr("exprl_megatron.config.precision.uses_cuda", lambda: machine == "cuda")


@pytest.mark.parametrize(("machine", "kind"), [("cuda", "bf16"), ("cpu", "fp32")])
def test_a_run_records_the_precision_that_it_found_and_resumes_with_it(tmp_path, monkeypatch, machine, kind):
    on(machine, monkeypatch)
    directory = started(RunDirectory(tmp_path / "run"))
    assert read_config(directory).policy.precision.kind == kind
    for precision in ("auto", kind):
        directory.claim(config(directory.root, policy={"model": "m", "precision": precision}), resume=True).release()


def test_a_run_of_a_cpu_is_not_resumed_on_cuda_in_another_precision(tmp_path, monkeypatch):
    on("cpu", monkeypatch)
    directory = started(RunDirectory(tmp_path / "run"))
    on("cuda", monkeypatch)
    with pytest.raises(UserError, match=r"other values of policy\.precision\.kind"):
        directory.claim(config(directory.root), resume=True)
    # Ranks that read the recorded config do not choose again.
    assert read_config(directory).policy.precision.dtype == "fp32"


@pytest.mark.parametrize(
    ("family", "router", "replays"), [("mixtral", False, True), ("mixtral", True, False), ("qwen3", False, False)]
)
def test_a_run_records_whether_it_replays_routing_and_resumes_with_it(tmp_path, tiny_model, family, router, replays):
    model, server = str(tiny_model(family)), {"router": router}
    directory = RunDirectory(tmp_path / "run")
    directory.claim(config(directory.root, policy={"model": model}, server=server), resume=False).release()
    directory.metrics.write_text('{"step": 1}\n')
    assert read_config(directory).policy.router_replay is replays
    for settings in ({}, {"router_replay": replays}):
        again = config(directory.root, policy={"model": model} | settings, server=server)
        directory.claim(again, resume=True).release()
    with pytest.raises(UserError, match=r"other values of policy\.router_replay \(changes what is computed\)"):
        directory.claim(config(directory.root, policy={"model": model, "router_replay": not replays}), resume=True)


def test_a_run_of_a_version_that_did_not_replay_routing_continues_without(tmp_path, tiny_model):
    policy = {"model": str(tiny_model("mixtral"))}
    directory = RunDirectory(tmp_path / "run")
    directory.claim(config(directory.root, policy=policy), resume=False).release()
    directory.metrics.write_text('{"step": 1}\n')
    tree = yaml.safe_load(directory.config.read_text())
    assert tree["policy"].pop("router_replay") is True
    for settings in ({}, {"router_replay": False}):
        directory.config.write_text(yaml.safe_dump(tree))
        directory.claim(config(directory.root, policy=policy | settings), resume=True).release()
        assert read_config(directory).policy.router_replay is False


@pytest.fixture
def umask():
    """The usual one, and afterwards that of before."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def modes(root) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in (root, *root.rglob("*"))}


def test_a_runs_directory_and_all_in_it_is_its_owners_alone(tmp_path, umask):
    directory = RunDirectory(tmp_path / "run")
    directory.registry.mkdir(parents=True)
    directory.resolved.write_text("from a recipe")
    directory.claim(config(tmp_path / "run"), False, {"a": "b"}).release()
    written = "import sys; open(sys.argv[1], 'w').write('by a process of the run')"
    subprocess.run([sys.executable, "-S", "-c", written, str(directory.logs / "trainer-0.log")], check=True)
    assert modes(directory.root) == {0o700, 0o600}
    assert (directory.config.stat().st_mode & 0o777, directory.root.stat().st_mode & 0o777) == (0o600, 0o700)


def test_a_runs_directory_is_shared_where_its_config_says_so(tmp_path, umask):
    directory = RunDirectory(tmp_path / "run")
    directory.claim(config(tmp_path / "run", permissions="shared"), False).release()
    assert modes(directory.root) == {0o755, 0o644}
    assert stat.S_IMODE(directory.root.stat().st_mode) == 0o755
    # Changed on resuming.
    directory.metrics.write_text("1")
    directory.claim(config(tmp_path / "run"), True).release()
    assert modes(directory.root) == {0o700, 0o600}
