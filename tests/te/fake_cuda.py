"""A GPU that is only a property: enough for Transformer Engine's modules to be built on the meta device."""

import types

import torch

from exprl_megatron.utils import accelerator


def pretend_gpu(capability: tuple[int, int]) -> None:
    """Makes torch say that there is one GPU of this compute capability; for a process that does nothing else after.

    Megatron allocates on torch.cuda.current_device(): all of that lands on the meta device.
    """
    properties = types.SimpleNamespace(
        name="pretended", major=capability[0], minor=capability[1], multi_processor_count=132, total_memory=80 * 2**30
    )
    torch.cuda.is_available = lambda: True
    # Its environment has Transformer Engine but none of SGLang's kernels.
    accelerator.uses_cuda = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: torch.device("meta")
    torch.cuda.set_device = lambda device: None
    torch.cuda.get_device_capability = lambda device=None: capability
    torch.cuda.get_device_properties = lambda device=None: properties
    torch.cuda.get_device_name = lambda device=None: properties.name
    # Attention under context parallelism has a second stream.
    torch.cuda.Stream = types.SimpleNamespace
    # The dispatcher of tokens to experts makes its indices on "cuda".
    arange = torch.arange
    torch.arange = lambda *sizes, device=None, **settings: arange(*sizes, device=_placed(device), **settings)


def _placed(device: torch.device | str | None) -> torch.device | str | None:
    return "meta" if device is not None and torch.device(device).type == "cuda" else device
