"""The state of a policy as Megatron's torch_dist files have it: a sharded description, its writer and its reader."""

import queue

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding, nested_values
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from exprl_megatron.policy.named_weights import named_weights
from exprl_megatron.policy.policy import Policy
from exprl_megatron.utils.required import required

_STAGE = "the stage that begin_stage starts"


def sharded_state(policy: Policy, loading: bool, same_layout: bool = True) -> dict:
    """Return Megatron's sharded description of everything that goes into the torch_dist files."""
    stage, world = required(policy.stage, _STAGE), policy.world
    models = {f"model{i}": chunk.sharded_state_dict(metadata=_metadata()) for i, chunk in enumerate(policy.chunks)}
    state = dict(models)
    state["optimizer"] = stage.optimizer.sharded_state_dict(models, is_loading=loading, metadata=_metadata())
    if stage.ref_weights is not None:
        for index in range(len(policy.chunks)):
            state[f"start{index}"] = _ref_weights(policy, index)
    if same_layout:
        states = {"torch": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
        state["random"] = ShardedObject("random", states, (dist.get_world_size(),), (world.rank,))
    return state


def save_strategy() -> FullyParallelSaveStrategyWrapper:
    """Return Megatron's writer of these files, by which ranks with the same shards write a part each."""
    # Megatron passes results of its writers through a server process, which would outlive a killed trainer;
    # within one process a plain queue does.
    filesystem_async._results_queue = queue.Queue()
    # With one thread a failed write is reported to every rank; with more, the failing rank raises alone.
    strategy = TorchDistSaveShardedStrategy(thread_count=1)
    return FullyParallelSaveStrategyWrapper(strategy, _replicas())


def load_strategy() -> FullyParallelLoadStrategyWrapper:
    """Return Megatron's reader of these files, by which ranks with the same shards read a part each."""
    return FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), _replicas())


def _metadata() -> dict:
    """Return the metadata of Megatron's sharded descriptions; a new dict each time, since they write groups into it."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def _ref_weights(policy: Policy, index: int) -> dict:
    """Return the description of a chunk's weights, with the reference policy's values under names of their own."""
    chunk = policy.chunks[index]
    ref_weights = required(required(policy.stage, _STAGE).ref_weights, "the reference policy")[index]
    values = {id(weight): ref_weights[name] for name, weight in named_weights(chunk)}
    described = chunk.sharded_state_dict(metadata=_metadata())
    for shard in nested_values(described):
        if isinstance(shard, ShardedBase) and id(shard.data) in values:
            shard.data = values[id(shard.data)].clone()
    add_prefix_for_sharding(described, "start.")
    return described


def _replicas():
    """Return the ranks that hold the same shards, which share reading and writing."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)
