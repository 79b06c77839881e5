"""How much memory a call takes at its highest point."""

import os
from collections.abc import Callable
from itertools import accumulate

import torch

from exprl_megatron.utils.accelerator import uses_cuda


def extra_bytes(call: Callable[[], object]) -> int:
    """Return bytes of tensors on the device at the highest point of `call`, less those that were there before it.

    Counted by torch's allocator: on CUDA it keeps the maximum, on a CPU the profiler tells of every piece.
    """
    if uses_cuda():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # Else the profiler says at every start that it found no GPU.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes, initial=0))
