"""A world of one process, for tests that need no more."""

from collections.abc import Iterator

import pytest

from exprl_megatron.config.policy import Layout
from exprl_megatron.policy.world import World, enter_world, leave_world


@pytest.fixture
def world() -> Iterator[World]:
    """This process alone."""
    yield enter_world(Layout())
    leave_world()
