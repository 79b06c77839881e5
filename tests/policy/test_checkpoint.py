"""One process: what is written, found, kept and refused; layouts are the matter of test_resharded_checkpoints.py."""

import os
import re
import resource
import shutil
from pathlib import Path
from random import Random

import psutil
import pytest
import torch
from helpers.witness import loss_function, sequences, tokens

from exprl_megatron.config.policy import OptimizerConfig, PolicyConfig
from exprl_megatron.errors import UserError
from exprl_megatron.policy.checkpoint import intact_checkpoint, load_checkpoint, read_extra, save_checkpoint
from exprl_megatron.policy.checkpoint_files import DamagedCheckpoint, checksums, read_record
from exprl_megatron.policy.policy import Policy

BATCH = sequences(128)
ADAM = OptimizerConfig(lr=1e-2)


def fresh(
    tiny_model, family: str = "qwen3", optimizer: OptimizerConfig = ADAM, keep_ref_policy: bool = False
) -> Policy:
    config = PolicyConfig(model=str(tiny_model(family)), max_tokens=64, micro_batch_tokens=256)
    policy = Policy(config, seed=0)
    policy.begin_stage(optimizer, total_steps=9, keep_ref_policy=keep_ref_policy)
    return policy


def step(policy: Policy) -> float:
    policy.accumulate(BATCH, loss_function, 1.0, tokens(BATCH))
    return policy.apply_update().grad_norm


@pytest.fixture
def policy(tiny_model, world) -> Policy:
    return fresh(tiny_model)


def test_the_newest_complete_checkpoint_is_found_and_older_ones_are_deleted(policy, tmp_path):
    root = tmp_path / "checkpoints"
    assert intact_checkpoint(root) == (None, [])
    written = [save_checkpoint(root, policy, {"n": n}, keep=2) for n in range(3)]
    assert intact_checkpoint(root) == (written[-1], [])
    assert read_extra(written[-1]) == {"n": 2}
    assert sorted(root.iterdir()) == written[1:]


def test_saving_starts_no_process_that_could_be_left_behind(policy, tmp_path):
    before = psutil.Process().children(recursive=True)
    save_checkpoint(tmp_path, policy, {}, keep=1)
    assert psutil.Process().children(recursive=True) == before


def test_a_checkpoint_that_was_being_written_does_not_count(policy, tmp_path):
    complete = save_checkpoint(tmp_path, policy, {}, keep=9)
    shutil.copytree(complete, tmp_path / "checkpoint-00000002.tmp")
    assert intact_checkpoint(tmp_path) == (complete, [])
    following = save_checkpoint(tmp_path, policy, {}, keep=9)
    assert intact_checkpoint(tmp_path) == (following, [])
    assert not list(tmp_path.glob("*.tmp"))


def test_a_checkpoint_from_before_the_first_step_can_be_resumed(policy, tiny_model, tmp_path):
    path = save_checkpoint(tmp_path, policy, {"a": [1]}, keep=1)
    expected = [step(policy), step(policy)]
    resumed = fresh(tiny_model)
    step(resumed)
    assert load_checkpoint(path, resumed) == {"a": [1]}
    assert [step(resumed), step(resumed)] == expected


def test_in_bf16_what_is_kept_in_fp32_is_resumed_bit_for_bit_too(tiny_model, world, tmp_path):
    def begun() -> Policy:
        config = PolicyConfig(model=str(tiny_model("qwen3.5")), max_tokens=64, micro_batch_tokens=256, precision="bf16")
        policy = Policy(config, seed=0)
        policy.begin_stage(ADAM, total_steps=9, keep_ref_policy=True)
        return policy

    def state(policy: Policy) -> dict[str, torch.Tensor]:
        policy.gather_weights()
        (chunk,) = policy.chunks
        return {name: parameter.detach().clone() for name, parameter in chunk.named_parameters()}

    policy = begun()
    step(policy)
    path = save_checkpoint(tmp_path, policy, {}, keep=1)
    saved = state(policy)
    expected = [step(policy), step(policy)]
    resumed = begun()
    load_checkpoint(path, resumed)
    assert {str(tensor.dtype) for tensor in saved.values()} == {"torch.bfloat16", "torch.float32"}
    assert all(torch.equal(tensor, saved[name]) for name, tensor in state(resumed).items())
    assert [step(resumed), step(resumed)] == expected
    after = state(policy)
    assert all(torch.equal(tensor, after[name]) for name, tensor in state(resumed).items())


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
    assert intact_checkpoint(tmp_path) == (intact, [])
    assert load_checkpoint(intact, fresh(tiny_model)) == {"n": 1}


def test_a_disk_without_room_is_noticed_before_anything_is_written(policy, tmp_path, monkeypatch):
    intact = save_checkpoint(tmp_path, policy, {}, keep=1)
    before = listing(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=500_000))
    with pytest.raises(UserError, match=r"it needs 0\.\d MB; 0\.5 MB are free"):
        save_checkpoint(tmp_path, policy, {}, keep=1)
    assert listing(tmp_path) == before
    assert intact_checkpoint(tmp_path) == (intact, [])


def test_a_checkpoint_of_another_model_optimizer_or_loss_is_refused(policy, tiny_model, tmp_path):
    path = save_checkpoint(tmp_path, policy, {}, keep=1)
    with pytest.raises(UserError, match=r"another architecture than this run has; set policy\.model"):
        load_checkpoint(path, fresh(tiny_model, "llama"))
    with pytest.raises(UserError, match="another distributed than this run has"):
        load_checkpoint(path, fresh(tiny_model, optimizer=OptimizerConfig(distributed=False)))
    with pytest.raises(UserError, match="another start_kept than this run has"):
        load_checkpoint(path, fresh(tiny_model, keep_ref_policy=True))


def test_what_is_not_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is not a complete checkpoint \(state.json is missing\)"):
        read_extra(tmp_path)
    for content in ("{", "[]", "null", "[" * 200_000, "{}"):
        (tmp_path / "state.json").write_text(content)
        with pytest.raises(UserError, match=r"is not a complete checkpoint \(state.json is not what was written\)"):
            read_extra(tmp_path)


@pytest.fixture
def two_checkpoints(tiny_model, world, tmp_path) -> tuple[Path, Path]:
    """An older and a newer one."""
    policy = fresh(tiny_model)
    return tuple(save_checkpoint(tmp_path, policy, {"n": n}, keep=2) for n in (1, 2))


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def test_a_checkpoint_in_which_any_one_file_is_damaged_is_named_and_the_one_before_is_taken(two_checkpoints, tmp_path):
    older, newer = two_checkpoints
    kept = shutil.copytree(newer, tmp_path / "copy")
    names = sorted(path.name for path in newer.iterdir())
    assert {"state.json", ".metadata", "metadata.json", "__0_0.distcp"} <= set(names)
    random = Random(0)
    for name in names:
        damages = {"flip": lambda f: flip(f, random.randrange(8 * f.stat().st_size)), "delete": Path.unlink}
        damages |= {"truncate": lambda f: os.truncate(f, 30), "zero": lambda f: f.write_bytes(bytes(f.stat().st_size))}
        for damage in damages.values():
            damage(newer / name)
            found, (told,) = intact_checkpoint(tmp_path)
            assert found == older
            assert re.search(rf"{newer} is damaged \({re.escape(name)} .*is now {newer.name}\.damaged\.$", told)
            shutil.rmtree(newer.with_name(newer.name + ".damaged"))
            shutil.copytree(kept, newer)
    assert intact_checkpoint(tmp_path) == (newer, [])


def test_every_byte_of_the_record_counts(two_checkpoints, tmp_path):
    _, newer = two_checkpoints
    file = newer / "state.json"
    whole = file.read_bytes()
    for place in range(len(whole)):
        flip(file, 8 * place + place % 8)
        with pytest.raises(DamagedCheckpoint):
            read_record(newer)
        file.write_bytes(whole)
    assert read_record(newer)["extra"] == {"n": 2}


def test_a_damaged_checkpoint_is_not_counted_among_those_that_are_kept(two_checkpoints, tiny_model, tmp_path):
    older, newer = two_checkpoints
    (newer / ".metadata").unlink()
    assert intact_checkpoint(tmp_path)[0] == older
    following = save_checkpoint(tmp_path, fresh(tiny_model), {"n": 3}, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {older.name, following.name, newer.name + ".damaged"}


def test_where_every_checkpoint_is_damaged_the_run_does_not_begin_again_by_itself(two_checkpoints, tmp_path):
    for checkpoint in two_checkpoints:
        flip(checkpoint / "__0_0.distcp", 777_777)
    with pytest.raises(UserError, match=r"(?s)checkpoint-00000002 is damaged.*checkpoint-00000001 is.*No other check"):
        intact_checkpoint(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-0000000{n}.damaged" for n in (1, 2)]


def test_a_file_that_goes_missing_after_it_was_verified_is_one_sentence(two_checkpoints, tiny_model):
    _, newer = two_checkpoints
    (newer / "__0_0.distcp").unlink()
    with pytest.raises(UserError, match=r"The checkpoint .*checkpoint-00000002 cannot be read"):
        load_checkpoint(newer, fresh(tiny_model))


def test_ranks_read_the_files_of_a_checkpoint_between_them_and_each_what_it_wrote(tmp_path):
    names = [*(f"__{rank}_0.distcp" for rank in range(4)), ".metadata", "common.pt"]
    for name in names:
        (tmp_path / name).write_text(name)
    shares = [checksums(tmp_path, rank, 4) for rank in range(4)]
    assert sorted(name for share in shares for name in share) == sorted(names)
    assert all(f"__{rank}_0.distcp" in share for rank, share in enumerate(shares))
    # XXH3's own published value for the empty input.
    (tmp_path / "empty").touch()
    assert checksums(tmp_path, 0, 1)["empty"] == "99aa06d3014798d86001c324468d497f"
