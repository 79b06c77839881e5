"""The command line and environment of one SGLang server: all that differs between CPU and CUDA is decided here."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.models import qwen3_5
from exprl_megatron.models.layer_types import LINEAR
from exprl_megatron.models.rope import read_rope
from exprl_megatron.serving.loader_commands import LOADER
from exprl_megatron.utils import accelerator
from exprl_megatron.utils.cuda_environment import DETERMINISTIC, is_deterministic, shared_variables
from exprl_megatron.utils.ports import LOCAL

CPU_BACKEND = Path(__file__).parent / "cpu_backend"
PLUGINS = Path(__file__).parent / "plugins"
SERVER = "exprl_megatron.serving.keyed_server"
CPU_MAX_TOTAL_TOKENS = 65_536
CPU_MAX_STATES = 1536
CPU_STATE_BYTES = 2**31
"""On a CPU: how many states of gated delta nets a server keeps at most, and their memory over all ranks.

SGLang 0.5.23 keeps three for each running request; by itself it would fill half of the machine's memory with them.
"""
# What torchrun tells its ranks; a server that inherits it looks for its own process group in the wrong place.
_TORCHRUN = ("MASTER_", "TORCHELASTIC_", "GROUP_", "ROLE_")
_TORCHRUN_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def server_command(
    model: Path,
    config: ServerConfig,
    *,
    dtype: str,
    port: int,
    seed: int,
    weight_version: str,
    cuda: bool,
    bind: str = LOCAL,
    first_gpu: int = 0,
) -> list[str]:
    """Return the arguments of `python -m sglang.launch_server`, which takes its key from a file; it listens at the
    address `bind`.

    On a CPU requests are sampled from their own seed. On CUDA SGLang honors it only with
    `--enable-deterministic-inference`, which costs speed and is left to `config.extra_args`; else from `seed`.

    More than 7 parameters: each is an argument of the command.
    """
    command = [
        sys.executable,
        "-m",
        SERVER,
        "--model-path",
        str(model),
        "--dtype",
        dtype,
    ]
    command += ["--host", bind, "--port", str(port), "--tp-size", str(config.tp)]
    command += ["--random-seed", str(seed), "--weight-version", weight_version]
    command += ["--log-level-http", "warning", "--sleep-on-idle"]
    command += ["--custom-weight-loader", LOADER]
    command += _arguments_of(model, cuda)
    max_total_tokens = config.max_total_tokens
    if cuda:
        command += ["--base-gpu-id", str(first_gpu)]
        if config.mem_fraction_static is not None:
            command += ["--mem-fraction-static", f"{config.mem_fraction_static:g}"]
    else:
        command += ["--device", "cpu", "--attention-backend", "torch_native", DETERMINISTIC]
        command += ["--disable-overlap-schedule", "--skip-server-warmup", "--mem-fraction-static", "0.9"]
        max_total_tokens = max_total_tokens or CPU_MAX_TOTAL_TOKENS
    if max_total_tokens is not None:
        command += ["--max-total-tokens", str(max_total_tokens)]
    if config.max_running_requests is not None:
        command += ["--max-running-requests", str(config.max_running_requests)]
    return [*command, *config.extra_args]


def _arguments_of(model: Path, cuda: bool) -> list[str]:
    """Return the arguments with which a server of this model computes what the policy does, from the weights it
    gets.
    """
    path = model / "config.json"
    tree = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    names = tree.get("architectures")
    if names == ["Glm4MoeForCausalLM"] and cuda:
        # Only there does SGLang store the shared expert as one more of the experts that a router chooses from.
        return ["--disable-shared-experts-fusion"]
    if not names or names[0] not in qwen3_5.NAMES:
        return []
    text = qwen3_5.text_settings(tree, str(path))
    rope = read_rope(text, str(path))
    settings = qwen3_5.served_settings(text, rope.base, rope.share)
    if names[0] in qwen3_5.VISION_MODELS:
        # SGLang's --language-model-only refuses this architecture; its model obeys the setting.
        settings = {"language_model_only": True, "text_config": settings}
    arguments = ["--json-model-override-args", json.dumps(settings)]
    return arguments if cuda else [*arguments, "--max-mamba-cache-size", str(_cpu_states(text))]


def _cpu_states(text: dict) -> int:
    """Return how many states a server of gated delta nets keeps on a CPU; see CPU_MAX_STATES."""
    each = qwen3_5.delta_net(text).state_bytes * max(1, qwen3_5.layer_types(text).count(LINEAR))
    return min(CPU_MAX_STATES, max(3, CPU_STATE_BYTES // each))


def irreproducible_sampling(config: ServerConfig, cuda: bool) -> str | None:
    """Return the sentence for the user where servers do not use the seeds of requests, else None."""
    if not cuda or is_deterministic(config.extra_args):
        return None
    return (
        f"Sampling on CUDA is not reproducible: SGLang does not use the seeds of requests without {DETERMINISTIC} in "
        "the servers' extra arguments, which costs speed."
    )


def server_environment(
    inherited: Mapping[str, str], *, cuda: bool, tp: int = 1, extra_args: Sequence[str] = (), cpu_threads: int = 1
) -> dict[str, str]:
    """Return the environment of a server of `tp` ranks and these extra arguments, started from a process with
    `inherited`.

    Without CUDA each rank computes with `cpu_threads` threads.
    """
    environment = {
        name: value
        for name, value in inherited.items()
        if not name.startswith(_TORCHRUN) and name not in _TORCHRUN_NAMES
    }
    # Without bytecode each of a server's processes compiles 10,000 modules at every start.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment.update(HF_HUB_OFFLINE="1", PYTHONUNBUFFERED="1")
    environment.update(accelerator.environment(cuda))
    environment.update(shared_variables(inherited, extra_args, tp))
    # A family that SGLang has no class of its own for; a package that the user names has to have one.
    environment.setdefault("SGLANG_EXTERNAL_MODEL_PACKAGE", "exprl_served_models")
    path = [str(PLUGINS), *([] if cuda else [str(CPU_BACKEND)]), inherited.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
    if not cuda:
        environment.update(
            SGLANG_USE_CPU_ENGINE="1",
            SGLANG_EXTERNAL_MODEL_PACKAGE="exprl_sglang_models",
            # More threads than free cores wait for each other in spin loops: 60 times slower on a busy machine.
            OMP_NUM_THREADS=str(cpu_threads),
            # Seeded sampling is decorated with torch.compile.
            TORCHDYNAMO_DISABLE="1",
            # What a gated delta net's convolution keeps of a request: bf16 would round log-probs by 0.1.
            SGLANG_MAMBA_CONV_DTYPE="float32",
        )
        if tp > 1:
            cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
            # Without these, ranks would bind to a NUMA node each, and set up NCCL on CUDA devices where they find it.
            environment.update(SGLANG_CPU_OMP_THREADS_BIND="|".join([cores] * tp), SGLANG_NCCL_SO_PATH="none")
    return environment
