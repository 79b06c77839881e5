"""The trainer's processes: process groups of a layout, device and seed."""

import gc
import logging
import os
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from exprl_megatron.config.policy import Layout
from exprl_megatron.errors import UserError
from exprl_megatron.policy.gloo_group import gloo_group
from exprl_megatron.policy.signed_objects import use_key
from exprl_megatron.utils.accelerator import group_backend, uses_cuda
from exprl_megatron.utils.keyed_store import connect_store, keyed_names, start_store
from exprl_megatron.utils.ports import interface

_store: dist.TCPStore | None = None
"""In which this process meets the others; it lives as long as the process."""
_worlds = 0
"""That this process has been in."""


@dataclass(frozen=True)
class World:
    """This process's place among the trainer's processes; `*_rank` are its coordinates in the layout."""

    layout: Layout
    device: torch.device
    rank: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    cp_rank: int = 0
    ep_rank: int = 0
    etp_rank: int = 0

    @property
    def last_stage(self) -> bool:
        """Whether this process holds the model's end (the pipeline's last stage)."""
        return self.pp_rank == self.layout.pp - 1


def enter_world(layout: Layout, seed: int = 0, timeout_s: float = 600.0, key: str | None = None) -> World:
    """Join the processes that torchrun or srun started (otherwise a world of one rank) in the groups of `layout`.

    Tensors go over NCCL where CUDA is and over gloo elsewhere, objects over gloo (gloo_group). An existing torch
    process group is used as it is; groups of another layout are dropped first, so one set of processes can go through
    several layouts. Processes find each other, and believe each other's objects, only with the same `key`. Every
    collective that waits longer than `timeout_s` raises.

    Raises:
        UserError: the number of processes is not the layout's.
    """
    # NCCL takes the current device, which this sets.
    _device()
    use_key(key)
    if not dist.is_initialized():
        _start_process_group(timeout_s, key)
    processes = dist.get_world_size()
    if processes != layout.world_size:
        sizes = f"tp {layout.tp} x cp {layout.cp} x dp {layout.dp} x pp {layout.pp}"
        raise UserError(
            f"{processes} trainer processes were started but policy.layout needs {layout.world_size} ({sizes}); "
            f"start {layout.world_size}, or change the layout."
        )
    gloo_group(timeout_s)
    make_groups(layout, timeout_s)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return current_world(layout)


def make_groups(layout: Layout, timeout_s: float = 600.0, gloo: bool = True) -> None:
    """Make Megatron's process groups for `layout` in place of those of another layout; torch's own must exist.

    `gloo`: for each data-parallel group another one over gloo, which checkpoints use.
    """
    # Megatron and torch's checkpoints warn about their own future changes; they raise real errors.
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"megatron\.core|torch\.distributed\.checkpoint")
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        distributed_timeout_minutes=timeout_s / 60,
        create_gloo_process_groups=gloo,
    )


def current_world(layout: Layout) -> World:
    """Return the world that enter_world made for `layout`.

    Raises:
        RuntimeError: it made none or another.
    """
    if not parallel_state.model_parallel_is_initialized():
        raise RuntimeError("this process is in no world; call enter_world first")
    sizes = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
        parallel_state.get_expert_tensor_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(),
    )
    if sizes != (layout.tp, layout.pp, layout.vpp, layout.cp, layout.ep, layout.etp, layout.dp):
        names = "tp, pp, vpp, cp, ep, etp, dp"
        raise RuntimeError(f"this process is in a world with {names} = {sizes}, not in that of {layout!r}")
    return World(
        layout=layout,
        device=_device(),
        rank=dist.get_rank(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        etp_rank=parallel_state.get_expert_tensor_parallel_rank(),
    )


def leave_world() -> None:
    """Destroy all process groups; enter_world may be called again afterwards."""
    parallel_state.destroy_model_parallel()
    # Models hold groups in reference cycles, and every group keeps threads and sockets.
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def local_rank() -> int:
    """Return this process's number on its machine, which is also its GPU's."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _device() -> torch.device:
    if not uses_cuda():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank())
    torch.cuda.set_device(device)
    return device


def _start_process_group(timeout_s: float, key: str | None) -> None:
    global _worlds
    timeout = timedelta(seconds=timeout_s)
    if "RANK" not in os.environ:
        dist.init_process_group(group_backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    # A later world of the same processes uses the same store under another name.
    _worlds += 1
    store = keyed_names(_meeting_store(timeout_s), key, f"world {_worlds}")
    rank, size = int(_variable("RANK")), int(_variable("WORLD_SIZE"))
    dist.init_process_group(group_backend(), store=store, rank=rank, world_size=size, timeout=timeout)


def _meeting_store(timeout_s: float) -> dist.TCPStore:
    """Return the store at torchrun's MASTER_ADDR and MASTER_PORT: rank 0's, unless torchrun or our launcher
    holds it.
    """
    global _store
    if _store is None:
        address, port = _variable("MASTER_ADDR"), int(_variable("MASTER_PORT"))
        held = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if int(_variable("RANK")) == 0 and not held:
            _store = start_store(interface(address), port, timeout_s)
        else:
            _store = connect_store(address, port, timeout_s)
    return _store


def _variable(name: str) -> str:
    if name not in os.environ:
        raise UserError(f"RANK is set in the environment and {name} is not; start all ranks with torchrun.")
    return os.environ[name]
