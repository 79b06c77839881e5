"""The environment variables by which CUDA's libraries are set up: those that trainer and servers must share, and more.

NCCL reads its variables when a communicator is made; where members of one differ in them, it fails or hangs. SGLang
sets some of them in its servers, so the trainer's ranks get the same ones. A value that the user has set is kept, for
both sides, unless SGLang overrides it.
"""

from collections.abc import Mapping, Sequence

DETERMINISTIC = "--enable-deterministic-inference"
_OFF_UNLESS_SET = ("NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE")
_DETERMINISTIC_CHANNELS = "SGLANG_DETERMINISTIC_NCCL_NCHANNELS"
_FOR_RANKS = {
    # One queue of work for each GPU, so that communication starts in the order in which it is issued and overlaps with
    # computation; Megatron's own scripts require it for tp or cp of 2 or more on Hopper and before.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # FlashAttention 4 is a beta that SGLang installs. NVTE_FLASH_ATTN=0 would make Megatron refuse to build a model
    # whose attention backend is `auto`.
    "NVTE_FLASH_ATTN_V4": "0",
}


def shared_variables(inherited: Mapping[str, str], server_args: Sequence[str], tp: int) -> dict[str, str]:
    """Return the variables of every process that exchanges weights with a server of `tp` ranks and these arguments.

    As SGLang 0.5.23 sets it for such a server (`entrypoints/engine.py:_set_envs_and_config` and
    `arg_groups/attention_hook.py`).
    """
    found = {name: inherited.get(name, "0") for name in _OFF_UNLESS_SET}
    if _value(server_args, "--moe-a2a-backend") == "deepep_v2":
        found["NCCL_CUMEM_ENABLE"] = inherited.get("NCCL_CUMEM_ENABLE", "1")
    if "--enable-nccl-nvls" in server_args:
        found["NCCL_NVLS_ENABLE"] = "1"
    if "--enable-symm-mem" in server_args:
        found.update(NCCL_CUMEM_ENABLE="1", NCCL_NVLS_ENABLE="1")
    if tp > 1 and is_deterministic(server_args):
        channels = inherited.get(_DETERMINISTIC_CHANNELS, "8")
        found.update(NCCL_ALGO="allreduce:tree", NCCL_MIN_NCHANNELS=channels, NCCL_MAX_NCHANNELS=channels)
    return found


def shared_text(inherited: Mapping[str, str], server_args: Sequence[str], tp: int) -> str:
    """Return `shared_variables` in one line, to be compared with those of a process on another machine."""
    return " ".join(f"{name}={value}" for name, value in sorted(shared_variables(inherited, server_args, tp).items()))


def rank_variables(inherited: Mapping[str, str], server_args: Sequence[str] = (), tp: int = 1) -> dict[str, str]:
    """Return the variables of trainer ranks that send weights to servers of `tp` ranks with these arguments."""
    own = {name: inherited.get(name, value) for name, value in _FOR_RANKS.items()}
    return own | shared_variables(inherited, server_args, tp)


def is_deterministic(server_args: Sequence[str]) -> bool:
    """Return whether these arguments of SGLang switch deterministic inference on, without which it ignores requests'
    seeds.
    """
    return DETERMINISTIC in server_args or _value(server_args, "--rl-on-policy-target") is not None


def _value(arguments: Sequence[str], flag: str) -> str | None:
    """Return the last value of an option that is written `--flag value` or `--flag=value`."""
    found = None
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            found = arguments[i + 1]
        elif argument.startswith(f"{flag}="):
            found = argument.removeprefix(f"{flag}=")
    return found
