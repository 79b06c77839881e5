"""Checks the software and hardware that a run needs, and reports what each missing part prevents."""

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from exprl_megatron.policy.delta_net_kernels import MODULE, PACKAGE
from exprl_megatron.rewards.code_sandbox import recursion_depth, sandbox_available
from exprl_megatron.utils.accelerator import device_visible, missing_gpu_packages, uses_cuda
from exprl_megatron.utils.cuda_environment import rank_variables, shared_variables

ESSENTIAL = ("Python", "torch", "megatron-core", "sglang", "SGLang kernels", "ports")
"""Parts without which no run is possible."""
ESSENTIAL_ON_GPUS = (*ESSENTIAL, "GPUs", "transformer-engine", "accelerator")
"""Those, and what a node with GPUs is for."""
NEEDED_BY_RUN = "run: "
"""Parts of a run that was named begin so, and are essential."""
VERBS = "libibverbs.so.1"
PROVIDERS = "/etc/libibverbs.d"
RDMA_DEVICES = "/dev/infiniband"
_OVER_TCP = "RDMA between nodes: NCCL takes TCP, and says nothing"
_DISK_GB = 10
_CONTEST_DEPTH = 5_000
_GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One checked part: whether it is present, what was found, and what its absence prevents."""

    part: str
    ok: bool
    found: str
    prevents: str = ""


def examine() -> list[Finding]:
    """Return every finding, in the order of the table."""
    gpus = _gpus()
    return [
        _python(),
        _package("torch", "torch", "everything"),
        _package("megatron-core", "megatron.core", "training"),
        _package("sglang", "sglang", "sampling and judging"),
        _cpu_backend(),
        _package("transformer-engine", "transformer_engine", "FP8 and the fast kernels on GPUs"),
        _apex(),
        _package(PACKAGE, MODULE, "gated delta nets (Qwen3.5) on GPUs"),
        Finding("GPUs", bool(gpus), ", ".join(gpus) or "none", "" if gpus else "models of more than toy size"),
        _accelerator(),
        *_variables(),
        _verbs(),
        _rdma_devices(),
        _package("nemo-run", "nemo_run", "recipes and Slurm"),
        *_sandbox(),
        _ports(),
        _disk(),
    ]


def lacking(findings: list[Finding], gpus: bool) -> list[str]:
    """Return the essential parts, of a node with `gpus` or of any machine, and those of a named run, that are not
    there.
    """
    essential = ESSENTIAL_ON_GPUS if gpus else ESSENTIAL
    return [
        finding.part
        for finding in findings
        if not finding.ok and (finding.part in essential or finding.part.startswith(NEEDED_BY_RUN))
    ]


def print_findings(findings: list[Finding], as_json: bool) -> None:
    """Print a table, or JSON: {"findings": [{part, ok, found, prevents}, ...]}."""
    if as_json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings]}, indent=2))
        return
    table = Table("part", "", Column("found", overflow="fold"), Column("without it: no", overflow="fold"))
    for finding in findings:
        mark = "[green]yes[/]" if finding.ok else "[yellow]no[/]"
        table.add_row(finding.part, mark, finding.found, finding.prevents)
    Console().print(table)


def _python() -> Finding:
    ok = sys.version_info[:2] == (3, 12)
    return Finding("Python", ok, f"{platform.python_version()} at {sys.executable}", "" if ok else "installation")


def _package(name: str, module: str, prevents: str) -> Finding:
    """Look the package up without importing it: an import of torch or SGLang takes many seconds."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = None
    if version is None or importlib.util.find_spec(module.partition(".")[0]) is None:
        return Finding(name, False, "not installed", prevents)
    return Finding(name, True, version)


def _apex() -> Finding:
    """Look up apex's kernel, which the package of the same name on PyPI lacks, without loading it."""
    found = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    prevents = "policy.gradient_accumulation_fusion (optional)"
    return Finding("apex", found, "with its CUDA kernels" if found else "not installed", "" if found else prevents)


def _cpu_backend() -> Finding:
    return Finding("SGLang kernels", True, "CUDA" if uses_cuda() else "replacements for a machine without CUDA")


def _accelerator() -> Finding:
    """Report what trainer, servers and groups run on here, and why not on a GPU that is present."""
    if uses_cuda():
        return Finding("accelerator", True, "CUDA")
    if not device_visible():
        return Finding("accelerator", True, "CPU")
    missing = " and ".join(missing_gpu_packages())
    return Finding("accelerator", False, f"CPU, as this environment has not {missing}", "use of GPUs")


def _variables() -> list[Finding]:
    """Return the environment variables as a run's processes will have them; the user's own are marked."""
    shared = shared_variables(os.environ, (), tp=1)
    ranks = {name: value for name, value in rank_variables(os.environ).items() if name not in shared}
    parts = {"NCCL, trainer and servers": shared, "CUDA, trainer": ranks}
    return [Finding(part, True, ", ".join(map(_assignment, values.items()))) for part, values in parts.items()]


def _assignment(variable: tuple[str, str]) -> str:
    name, value = variable
    return f"{name}={value}" + (" (yours)" if name in os.environ else "")


def _verbs() -> Finding:
    """Return the library through which NCCL reaches InfiniBand and RoCE, loaded as NCCL does, and the adapters'
    drivers.
    """
    try:
        ctypes.CDLL(VERBS)
    except OSError:
        return Finding("InfiniBand library", False, f"{VERBS} is not installed", _OVER_TCP)
    if not any(Path(PROVIDERS).glob("*.driver")):
        return Finding("InfiniBand library", False, f"{VERBS} without drivers (package ibverbs-providers)", _OVER_TCP)
    return Finding("InfiniBand library", True, VERBS)


def _rdma_devices() -> Finding:
    devices = sorted(path.name for path in Path(RDMA_DEVICES).glob("uverbs*"))
    found = ", ".join(devices) or f"nothing in {RDMA_DEVICES}"
    return Finding("InfiniBand adapters", bool(devices), found, "" if devices else _OVER_TCP)


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _sandbox() -> list[Finding]:
    """Return whether programs can be run, and whether they can recurse as deep as where contests run them."""
    sandbox = sandbox_available()
    found = [Finding("sandbox for programs", sandbox.ok, sandbox.found, "" if sandbox.ok else "code problems")]
    if sandbox.ok:
        depth = recursion_depth()
        deep = depth >= _CONTEST_DEPTH
        lack = "" if deep else "right verdicts on programs that recurse deeper; use a later release of Python 3.12"
        found.append(Finding("recursion of programs", deep, f"{depth:,} calls through functools.cache", lack))
    return found


def _ports() -> Finding:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", 0))
        except OSError as error:
            return Finding("ports", False, f"127.0.0.1: {error.strerror}", "servers on this machine")
        return Finding("ports", True, f"free on 127.0.0.1 (for example {probe.getsockname()[1]})")


def _disk() -> Finding:
    free = shutil.disk_usage(".").free / _GIB
    ok = free >= _DISK_GB
    return Finding("disk", ok, f"{free:.0f} GiB free here", "" if ok else "checkpoints of more than a tiny model")
