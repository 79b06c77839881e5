"""Deltas of weights on disk: what they hold, and what they refuse."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from exprl_megatron.errors import UserError
from exprl_megatron.weight_sync.base_snapshot import BaseSnapshot, DeltaWriter, apply_delta
from exprl_megatron.weight_sync.delta_agent import apply_request

SHAPES = {"a.weight": (300, 200), "b.weight": (1000,), "c.weight": (64, 64)}


@pytest.fixture
def old() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}


@pytest.fixture
def mirrors(old, tmp_path) -> tuple[Path, Path]:
    """The trainer's copy and a server's, of version v1, in two files."""
    trainer, server = tmp_path / "trainer", tmp_path / "server"
    trainer.mkdir()
    save_file({"a.weight": old["a.weight"]}, trainer / "model-1.safetensors")
    save_file({name: old[name] for name in ("b.weight", "c.weight")}, trainer / "model-2.safetensors")
    BaseSnapshot(trainer).version = "v1"
    shutil.copytree(trainer, server)
    return trainer, server


def learned(old: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A step changes one number in fifty of two tensors, and none of the third."""
    new = {name: tensor.clone() for name, tensor in old.items()}
    for name in ("a.weight", "b.weight"):
        new[name].view(-1)[::50] *= 1.01
    return new


def written(trainer: Path, new: dict[str, torch.Tensor], version: str = "v2") -> tuple[Path, int]:
    path = trainer.parent / f"{version}.delta"
    writer = DeltaWriter(BaseSnapshot(trainer), path, version)
    writer.add(list(new.items()))
    return path, writer.finish()


def held(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_a_delta_makes_a_copy_equal_in_every_byte(mirrors, old):
    trainer, server = mirrors
    new = learned(old)
    path, size = written(trainer, new)
    assert (
        apply_delta(BaseSnapshot(server), path) == BaseSnapshot(server).version == BaseSnapshot(trainer).version == "v2"
    )
    for directory in mirrors:
        assert all(torch.equal(held(directory)[name], new[name]) for name in new)
    # One number in fifty changed: 2 % of the bytes, and where they are.
    assert size == path.stat().st_size < 0.1 * sum(tensor.nbytes for tensor in new.values())
    assert b"c.weight" not in path.read_bytes()


def test_one_that_starts_from_another_version_is_refused(mirrors, old):
    trainer, server = mirrors
    written(trainer, learned(old))
    path, _ = written(trainer, old, "v3")
    with pytest.raises(UserError, match="starts from version v2, but the snapshot has v1; delete it"):
        apply_delta(BaseSnapshot(server), path)
    assert all(torch.equal(held(server)[name], old[name]) for name in old)


def test_a_copy_that_differs_is_found_out_by_checksum(mirrors, old):
    trainer, server = mirrors
    path, _ = written(trainer, learned(old))
    mirror = BaseSnapshot(server)
    spoilt = mirror.read("b.weight")
    spoilt[7] ^= 1
    mirror.write("b.weight", spoilt)
    with pytest.raises(UserError, match=r"tensor b\.weight does not match its checksum; delete the snapshot"):
        apply_delta(BaseSnapshot(server), path)


def test_a_delta_agent_makes_its_copy_again_on_request(mirrors, old):
    trainer, server = mirrors
    (server / "left-over.safetensors").write_bytes(b"")
    apply_request({"kind": "full", "file": "trainer"}, trainer.parent, server)
    assert {path.name for path in server.iterdir()} == {path.name for path in trainer.iterdir()}
    path, _ = written(trainer, learned(old))
    apply_request({"kind": "delta", "file": path.name}, trainer.parent, server)
    assert all(torch.equal(held(server)[name], tensor) for name, tensor in learned(old).items())
