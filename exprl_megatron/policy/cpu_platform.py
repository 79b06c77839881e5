"""What Megatron-Core needs on a machine without CUDA; nothing of this is active where CUDA is.

`install()` runs before the first import of `megatron.core`. From then on every `megatron.core` module
sees, under its own name `torch`, a view of torch in which "the CUDA device" is the CPU. The torch that
everyone else imports stays as it is, but for two methods of Tensor named below.
"""

import contextlib
import functools
import importlib.abc
import logging
import sys
import types
import warnings
from collections.abc import Callable

import torch

from exprl_megatron.policy.rotation import rotate_packed_row, rotate_rows
from exprl_megatron.utils.accelerator import hide_unused_cuda
from exprl_megatron.utils.gloo_device import share_gloo_device

CPU = torch.device("cpu")
PREFIX = "megatron.core."
FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "full", "full_like", "ones", "ones_like"),
    *("rand", "randn", "tensor", "zeros", "zeros_like"),
)


class NoStream:
    """Stands for a CUDA stream: the CPU has finished each operation before the next begins."""

    cuda_stream = 0

    def wait_stream(self, stream) -> None:
        """Do nothing: there is nothing to wait for."""

    def wait_event(self, event) -> None:
        """Do nothing: there is nothing to wait for."""

    def record_event(self, event=None) -> "NoEvent":
        """Return an event that has already happened."""
        return event or NoEvent()

    def synchronize(self) -> None:
        """Do nothing: there is nothing to wait for."""


class NoEvent:
    """Stands for a CUDA event that has already happened."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, stream=None) -> None:
        """Do nothing: there is nothing to record."""

    def wait(self, stream=None) -> None:
        """Do nothing: there is nothing to wait for."""

    def synchronize(self) -> None:
        """Do nothing: there is nothing to wait for."""


class CudaOnCpu(types.ModuleType):
    """`torch.cuda` as Megatron sees it; names not given here are the real ones."""

    Event = NoEvent
    Stream = NoStream

    def __getattr__(self, name: str):
        return getattr(torch.cuda, name)

    def is_available(self) -> bool:
        """Return False: nothing of Megatron computes on a device that is present but cannot be used."""
        return False

    def device_count(self) -> int:
        """Return 0, as is_available() is False."""
        return 0

    def current_device(self) -> torch.device:
        """Return a torch.device, which is valid where Megatron allocates with device=torch.cuda.current_device()."""
        return CPU

    def current_stream(self, device=None) -> NoStream:
        """Return a stream that orders nothing; gradient buffers and pipeline sends ask for one."""
        return NoStream()

    def stream(self, stream):
        """Return a context that changes nothing."""
        return contextlib.nullcontext()

    def synchronize(self, device=None) -> None:
        """Do nothing: pipeline sends and checkpoint staging would wait for a device."""

    def empty_cache(self) -> None:
        """Do nothing: there is no caching allocator."""

    def manual_seed(self, seed: int) -> None:
        """Seed the CPU's generator, as the tracker of random states seeds the device's."""
        torch.default_generator.manual_seed(seed)

    def get_rng_state(self, device=None) -> torch.Tensor:
        """Return the state of the CPU generator, uint8 [bytes], for Megatron's tracker of random states."""
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device=None) -> None:
        """Set the state of the CPU generator, uint8 [bytes]."""
        torch.set_rng_state(state)


class TorchView(types.ModuleType):
    """`torch` as Megatron sees it."""

    def __init__(self):
        super().__init__("torch")
        self.cuda = CudaOnCpu("torch.cuda")
        for name in FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str):
        return getattr(torch, name)


def _on_cpu(factory: Callable) -> Callable:
    """Return `factory` with device="cuda" (schedules, gradient clipping) read as the CPU and without pinned memory."""

    @functools.wraps(factory)
    def make(*args, **kwargs):
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return make


def _named_as_cuda(function: Callable) -> Callable:
    """Return `function` while Tensor.type() says 'torch.cuda.FloatTensor': the optimizer sorts parameters by that
    string.
    """
    plain = torch.Tensor.type

    def cuda_type(self, dtype=None, **kwargs):
        answer = plain(self, dtype, **kwargs) if dtype is not None else plain(self)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    @functools.wraps(function)
    def call(*args, **kwargs):
        before = torch.Tensor.type
        torch.Tensor.type = cuda_type
        try:
            return function(*args, **kwargs)
        finally:
            torch.Tensor.type = before

    return call


def _already_on_cpu(tensor, as_numpy: bool = False, record_stream: bool = False):
    """Return each expert's count of tokens; Megatron turns them into numbers only where it moves them off the
    device.
    """
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _gather_uneven(gather: Callable) -> Callable:
    """Replace Megatron's gather along the first dimension; gloo needs parts of equal length, so they are padded."""

    @functools.wraps(gather)
    def call(input_, group, output_split_sizes=None, use_global_buffer=False):
        if output_split_sizes is None:
            return gather(input_, group, use_global_buffer=use_global_buffer)
        longest = input_.new_zeros(max(output_split_sizes), *input_.shape[1:])
        longest[: len(input_)] = input_
        parts = [torch.empty_like(longest) for _ in output_split_sizes]
        torch.distributed.all_gather(parts, longest, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, output_split_sizes, strict=True)])

    return call


def _scatter_uneven(scatter: Callable) -> Callable:
    """Return the inverse, a sum over ranks of which each keeps its part."""

    @functools.wraps(scatter)
    def call(input_, group, input_split_sizes=None, use_global_buffer=False):
        if input_split_sizes is None:
            return scatter(input_, group, use_global_buffer=use_global_buffer)
        whole = input_.clone()
        torch.distributed.all_reduce(whole, group=group)
        return whole.split(list(input_split_sizes))[group.rank()].contiguous()

    return call


def _unless_alone(collective: Callable) -> Callable:
    """Gather or reduce-scatter into `output`; gloo takes as long over a group of one as over the memory
    itself.
    """

    @functools.wraps(collective)
    def call(output, input_, *args, group=None, **kwargs):
        if group is None or group.size() > 1:
            return collective(output, input_, *args, group=group, **kwargs)
        if output.data_ptr() != input_.data_ptr():
            output.copy_(input_)
        return None

    return call


def _adapt(module: types.ModuleType) -> None:
    """Give a freshly imported `megatron.core` module the view of torch, and its own adaptations where it has any."""
    if module.__dict__.get("torch") is torch:
        module.torch = VIEW
    name = module.__name__.removeprefix(PREFIX)
    if name == "optimizer.optimizer":
        mixed = module.Float16OptimizerWithFloat16Params
        mixed.__init__ = _named_as_cuda(mixed.__init__)
    elif name == "optimizer.distrib_optimizer":
        sharded = module.DistributedOptimizer
        sharded.__init__ = _named_as_cuda(sharded.__init__)
    elif name == "optimizer.clip_grads":
        module.clip_grad_by_total_norm_fp32 = _named_as_cuda(module.clip_grad_by_total_norm_fp32)
    elif name == "tensor_parallel.random":
        # These two use the CUDA generators directly, not through torch.cuda.
        module._get_cuda_rng_state = lambda device=None, clone=False, graph_safe=False: torch.get_rng_state()
        module._set_cuda_rng_state = lambda state, device=None, graph_safe=False: torch.set_rng_state(state)
    elif name == "tensor_parallel.mappings":
        module._gather_along_first_dim = _gather_uneven(module._gather_along_first_dim)
        module._reduce_scatter_along_first_dim = _scatter_uneven(module._reduce_scatter_along_first_dim)
    elif name == "distributed.param_and_grad_buffer":
        module.dist_all_gather_func = _unless_alone(module.dist_all_gather_func)
        module.dist_reduce_scatter_func = _unless_alone(module.dist_reduce_scatter_func)
    elif name == "models.common.embeddings.rope_utils":
        module.fused_apply_rotary_pos_emb = rotate_rows
        module.fused_apply_rotary_pos_emb_thd = rotate_packed_row
    elif name == "transformer.moe.moe_utils":
        module.maybe_move_tensor_to_cpu = _already_on_cpu


@contextlib.contextmanager
def _nothing_compiled():
    """Make `torch.compile` a no-op decorator inside: it would otherwise import its compilers, for two seconds.

    Megatron does the same where its `jit_fuser` is disabled.
    """

    def as_it_is(function=None, **_):
        return as_it_is if function is None else function

    compile_, torch.compile = torch.compile, as_it_is
    try:
        yield
    finally:
        torch.compile = compile_


class _Importer(importlib.abc.MetaPathFinder):
    """Adapts each `megatron.core` module right after its code has run, also those imported late."""

    def find_spec(self, name, path, target=None):
        if not name.startswith(PREFIX):
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module):
                with _nothing_compiled():
                    run(module)
                _adapt(module)

            spec.loader.exec_module = exec_module
        return spec


VIEW = TorchView()


def install() -> bool:
    """Prepare this process for Megatron-Core on CPU; return True if it did, False where CUDA makes it needless.

    Calling it again changes nothing.

    Raises:
        RuntimeError: megatron.core was imported before.
    """
    if hide_unused_cuda():
        return False
    if any(isinstance(finder, _Importer) for finder in sys.meta_path):
        return True
    if any(name.startswith(PREFIX) for name in sys.modules):
        raise RuntimeError("megatron.core was imported before exprl_megatron.policy; import the latter first.")
    sys.meta_path.insert(0, _Importer())
    share_gloo_device()
    for missing in ("Transformer Engine and Apex are not", "Apex is not"):
        # Several modules warn about these at import; on a CPU neither is used.
        warnings.filterwarnings("ignore", message=f"{missing} installed")
    # A warning about a CUDA toolkit without a GPU does not help a user who runs without a GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # Tied embeddings and checkpoints move tensors with .cuda(), which raises without a driver.
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    return True
