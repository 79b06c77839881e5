"""One process as any rank of any layout: models of any size on the meta device, for tests of large layouts."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import exprl_megatron.policy  # isort: skip  # noqa: F401 - must be imported before Megatron
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch.testing._internal.distributed.fake_pg import FakeStore

from exprl_megatron.config.policy import Layout, PolicyConfig
from exprl_megatron.models.architecture import Architecture
from exprl_megatron.policy.model import build_chunks
from exprl_megatron.policy.world import World, current_world, leave_world, make_groups


@contextmanager
def pretend_world(layout: Layout, rank: int) -> Iterator[World]:
    """Act as `rank` of the layout's trainer processes; no other process needs to exist.

    Torch's fake process groups replace the real ones and send nothing, so no result may depend on communication.
    Raises RuntimeError where this process is in a process group already.
    """
    if dist.is_initialized():
        raise RuntimeError("this process is in a process group already; leave_world first")
    # Leaving the world collects garbage: of what is made from here on.
    gc.freeze()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        make_groups(layout, gloo=False)
        yield current_world(layout)
    finally:
        leave_world()


def meta_chunks(architecture: Architecture, config: PolicyConfig, world: World) -> list[GPTModel]:
    """Build the chunks of `world` for `config` on the meta device: shapes and dtypes without memory."""
    return build_chunks(architecture, config, world, meta=True)
