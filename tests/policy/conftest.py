"""A world of one process, for tests that need no more."""

from collections.abc import Iterator

import pytest
from helpers.worlds import alone

from exprl_megatron.policy.world import World


@pytest.fixture
def world() -> Iterator[World]:
    """This process alone."""
    with alone() as entered:
        yield entered
