"""Whether this process and all that it starts compute on CUDA: one decision for trainer, servers and their groups.

The CPU environment's torch knows CUDA too, so a device alone does not decide: without Transformer Engine and SGLang's
kernels neither side could use it. Importing this module imports no torch.
"""

import ctypes
import functools
import importlib.util
import json
import os
import subprocess
import sys

from exprl_megatron.errors import UserError

GPU_PACKAGES = {"transformer_engine": "transformer-engine", "sgl_kernel": "sglang-kernel"}
"""What the GPU environment has and the CPU environment has not: name of the module, name of the package."""
INSTALL = "install the GPU environment (requirements/gpu.txt, as the Dockerfile does)"
VISIBLE = "CUDA_VISIBLE_DEVICES"
GROUP_BACKEND = "EXPRL_GROUP_BACKEND"
_ASK_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"
_DRIVER = ("libcuda.so.1", "libnvidia-ml.so.1")
"""What torch asks for devices: the driver's library, or its management library."""


def uses_cuda() -> bool:
    """Return whether everything here runs on CUDA: a device is visible and the GPU environment is installed."""
    return not missing_gpu_packages() and device_visible()


def group_backend() -> str:
    """Return the torch.distributed backend of groups that move tensors: NCCL between GPUs and gloo between CPUs.

    The environment variable EXPRL_GROUP_BACKEND names another one that torch knows, in the trainer and its servers.
    """
    return os.environ.get(GROUP_BACKEND) or ("nccl" if uses_cuda() else "gloo")


def gpu_count() -> int:
    """Return the number of CUDA devices that trainer and servers may use here; 0 where they run on the CPU."""
    return _devices()[1] if uses_cuda() else 0


def missing_gpu_packages() -> list[str]:
    """Return the packages of the GPU environment that are not installed; looked up, not imported."""
    return [package for module, package in GPU_PACKAGES.items() if importlib.util.find_spec(module) is None]


def device_visible() -> bool:
    """Return whether torch sees a CUDA device, usable or not."""
    return _devices()[0]


def _devices() -> tuple[bool, int]:
    """Return whether torch sees a CUDA device, and how many.

    A process without torch, such as the launcher, does not import it for this: where no driver is installed torch sees
    nothing, and where one is, another process asks torch.
    """
    if "torch" in sys.modules:
        return _torch_devices()
    if not any(map(_loads, _DRIVER)):
        return False, 0
    return _devices_elsewhere(os.environ.get(VISIBLE))


def _torch_devices() -> tuple[bool, int]:
    import torch

    if not missing_gpu_packages():
        return torch.cuda.is_available(), torch.cuda.device_count()
    # Asked of the driver's management library: torch's own way fixes the visible devices for this process's lifetime.
    before = os.environ.get(_ASK_NVML)
    os.environ[_ASK_NVML] = "1"
    try:
        return torch.cuda.is_available(), torch.cuda.device_count()
    finally:
        if before is None:
            del os.environ[_ASK_NVML]
        else:
            os.environ[_ASK_NVML] = before


@functools.cache
def _devices_elsewhere(visible: str | None) -> tuple[bool, int]:
    """Return what `_torch_devices` says in a new process; `visible` is CUDA_VISIBLE_DEVICES here and there."""
    done = subprocess.run([sys.executable, "-m", __name__], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        # Torch cannot be imported there; the import here raises the reason.
        return _torch_devices()
    seen, count = json.loads(done.stdout.splitlines()[-1])
    return seen, count


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def environment(cuda: bool) -> dict[str, str]:
    """Return the environment variables by which every library of a child process decides as `cuda` says."""
    return {} if cuda else {VISIBLE: ""}


def hide_unused_cuda() -> bool:
    """Return `uses_cuda()`, and where it is False hide the CUDA devices from this process's libraries and children.

    A hidden device is reported on stderr, in one line, by the first process that hides it.
    """
    if uses_cuda():
        return True
    if os.environ.get(VISIBLE) != "":
        if device_visible():
            print(f"exprl: {hidden_device_note()}", file=sys.stderr, flush=True)
        os.environ.update(environment(cuda=False))
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        # This process had initialized CUDA before: the variable comes too late for it.
        torch.cuda.is_available, torch.cuda.device_count = lambda: False, lambda: 0
    return False


def hidden_device_note() -> str:
    """Return the sentence about a CUDA device that is not used."""
    missing = " and ".join(missing_gpu_packages())
    return (
        f"this machine has a CUDA device but not {missing}, so everything runs on the CPU; {INSTALL} to use it, or set "
        f"{VISIBLE}= to choose the CPU."
    )


def installation_fault() -> str | None:
    """Return why neither CUDA nor the CPU would work as they should, as a sentence; None where one of them does."""
    missing = missing_gpu_packages()
    if len(missing) == len(GPU_PACKAGES) or uses_cuda():
        return None
    there = [package for package in GPU_PACKAGES.values() if package not in missing]
    if missing and device_visible():
        lacks = f"{there[0]} is installed and a CUDA device is visible, but {missing[0]} is not installed"
        return f"{lacks}; {INSTALL}, or use the CPU environment (`make setup`) with {VISIBLE}= set."
    if GPU_PACKAGES["transformer_engine"] in there:
        return (
            f"{there[0]} is installed, beside which Megatron-Core does not train on a CPU, but no CUDA device is "
            f"visible; use a machine with a GPU (see nvidia-smi and {VISIBLE}), or the CPU environment (`make setup`)."
        )
    return None


@functools.cache
def cuda_capability() -> tuple[int, int] | None:
    """Compute capability of the first CUDA device, None without CUDA.

    Asked for by a process of its own, as asking takes some of the device's memory for as long as a process lives.

    Raises:
        UserError: it does not answer.
    """
    if not uses_cuda():
        return None
    question = "import torch; print(*torch.cuda.get_device_capability())"
    reply = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True, timeout=120)
    if reply.returncode:
        reason = reply.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise UserError(
            f"The CUDA device does not report its compute capability ({reason[0]}); check it with nvidia-smi."
        )
    major, minor = reply.stdout.split()[-2:]
    return int(major), int(minor)


if __name__ == "__main__":
    print(json.dumps(_torch_devices()))
