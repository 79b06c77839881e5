"""One process: what is written, found, kept and refused; layouts are the matter of test_resharded_checkpoints.py."""

import json
import resource
import shutil
from pathlib import Path

import psutil
import pytest
import torch
from witness import loss_function, sequences, tokens

from exprl_megatron.config.policy import OptimizerConfig, PolicyConfig
from exprl_megatron.errors import UserError
from exprl_megatron.policy.checkpoint import latest_checkpoint, load_checkpoint, read_extra, save_checkpoint
from exprl_megatron.policy.policy import Policy

BATCH = sequences(128)
ADAM = OptimizerConfig(lr=1e-2)


def fresh(tiny_model, family: str = "qwen3", optimizer: OptimizerConfig = ADAM, keep_start: bool = False) -> Policy:
    config = PolicyConfig(model=str(tiny_model(family)), max_tokens=64, micro_batch_tokens=256)
    policy = Policy(config, seed=0)
    policy.begin_stage(optimizer, total_steps=9, keep_start=keep_start)
    return policy


def step(policy: Policy) -> float:
    policy.accumulate(BATCH, loss_function, 1.0, tokens(BATCH))
    return policy.apply_update().grad_norm


@pytest.fixture
def policy(tiny_model, world) -> Policy:
    return fresh(tiny_model)


def test_the_newest_complete_checkpoint_is_found_and_older_ones_are_deleted(policy, tmp_path):
    root = tmp_path / "checkpoints"
    assert latest_checkpoint(root) is None
    written = [save_checkpoint(root, policy, {"n": n}, keep=2) for n in range(3)]
    assert latest_checkpoint(root) == written[-1]
    assert read_extra(written[-1]) == {"n": 2}
    assert sorted(root.iterdir()) == written[1:]


def test_saving_starts_no_process_that_could_be_left_behind(policy, tmp_path):
    before = psutil.Process().children(recursive=True)
    save_checkpoint(tmp_path, policy, {}, keep=1)
    assert psutil.Process().children(recursive=True) == before


def test_a_checkpoint_without_its_mark_or_name_does_not_count(policy, tmp_path):
    complete = save_checkpoint(tmp_path, policy, {}, keep=9)
    shutil.copytree(complete, tmp_path / "checkpoint-00000002.tmp")
    (shutil.copytree(complete, tmp_path / "checkpoint-00000003") / "state.json").unlink()
    assert latest_checkpoint(tmp_path) == complete
    following = save_checkpoint(tmp_path, policy, {}, keep=9)
    assert latest_checkpoint(tmp_path) == following
    assert not list(tmp_path.glob("*.tmp"))


def test_a_checkpoint_from_before_the_first_step_can_be_resumed(policy, tiny_model, tmp_path):
    path = save_checkpoint(tmp_path, policy, {"a": [1]}, keep=1)
    expected = [step(policy), step(policy)]
    resumed = fresh(tiny_model)
    step(resumed)
    assert load_checkpoint(path, resumed) == {"a": [1]}
    assert [step(resumed), step(resumed)] == expected


def test_random_states_are_restored(policy, tmp_path):
    path = save_checkpoint(tmp_path, policy, {}, keep=1)
    expected = torch.rand(3)
    load_checkpoint(path, policy)
    assert torch.equal(torch.rand(3), expected)


def listing(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("largest_file", [200_000, 2_000])
def test_a_disk_that_fills_while_writing_leaves_the_last_checkpoint_intact(policy, tiny_model, tmp_path, largest_file):
    intact = save_checkpoint(tmp_path, policy, {"n": 1}, keep=1)
    before = listing(tmp_path)
    step(policy)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be written to .*the last complete checkpoint is intact"):
            save_checkpoint(tmp_path, policy, {"n": 2}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert listing(tmp_path) == before
    assert latest_checkpoint(tmp_path) == intact
    assert load_checkpoint(intact, fresh(tiny_model)) == {"n": 1}


def test_a_disk_without_room_is_noticed_before_anything_is_written(policy, tmp_path, monkeypatch):
    intact = save_checkpoint(tmp_path, policy, {}, keep=1)
    before = listing(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=500_000))
    with pytest.raises(UserError, match=r"it needs 0\.\d MB; 0\.5 MB are free"):
        save_checkpoint(tmp_path, policy, {}, keep=1)
    assert listing(tmp_path) == before
    assert latest_checkpoint(tmp_path) == intact


def test_a_checkpoint_of_another_model_optimizer_or_loss_is_refused(policy, tiny_model, tmp_path):
    path = save_checkpoint(tmp_path, policy, {}, keep=1)
    with pytest.raises(UserError, match=r"another architecture than this run has; set policy\.model"):
        load_checkpoint(path, fresh(tiny_model, "llama"))
    with pytest.raises(UserError, match="another distributed than this run has"):
        load_checkpoint(path, fresh(tiny_model, optimizer=OptimizerConfig(distributed=False)))
    with pytest.raises(UserError, match="another start_kept than this run has"):
        load_checkpoint(path, fresh(tiny_model, keep_start=True))


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a complete checkpoint"):
        read_extra(tmp_path)
    (tmp_path / "state.json").write_text(json.dumps({})[:1])
    with pytest.raises(UserError, match="is not a complete checkpoint"):
        read_extra(tmp_path)
