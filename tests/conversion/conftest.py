"""A world of one process, and models as dictionaries."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers.worlds import alone
from safetensors.torch import load_file

from exprl_megatron.policy.world import World


@pytest.fixture
def world() -> Iterator[World]:
    """This process alone."""
    with alone() as entered:
        yield entered


@pytest.fixture(scope="session")
def tensors() -> Callable[[Path], dict[str, torch.Tensor]]:
    """`tensors(directory)`: everything in its safetensors, by name."""
    return lambda directory: {
        name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()
    }


@pytest.fixture(scope="session")
def same() -> Callable[[dict, dict], bool]:
    """Whether two dictionaries of tensors are equal, bit for bit."""

    def compare(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
        return one.keys() == other.keys() and all(
            one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
        )

    return compare
