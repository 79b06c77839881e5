"""One process in the place of any rank of any layout: models of any size, without their memory or their machines.

Planner, conversion and tests use it to look at what each rank of a large layout would hold.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch.testing._internal.distributed.fake_pg import FakeStore

from exprl_megatron.config.policy import Layout, PolicyConfig
from exprl_megatron.models.architecture import Architecture
from exprl_megatron.policy.model import build_chunks
from exprl_megatron.policy.world import World, current_world, leave_world, make_groups


@contextmanager
def pretend_world(layout: Layout, rank: int) -> Iterator[World]:
    """This process stands for `rank` of the layout's trainer processes, of which no other needs to exist.

    Torch's fake process groups stand for the real ones: what they would send is not sent, so nothing may be
    computed here that depends on it. Raises RuntimeError where this process is in a process group already.
    """
    if dist.is_initialized():
        raise RuntimeError("this process is in a process group already; leave_world first")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        make_groups(layout, gloo=False)
        yield current_world(layout)
    finally:
        leave_world()


def meta_chunks(architecture: Architecture, config: PolicyConfig, world: World) -> list[GPTModel]:
    """What build_chunks builds in `world` for `config`, on the meta device: shapes and dtypes without memory."""
    return build_chunks(architecture, config, world, meta=True)
