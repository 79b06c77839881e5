"""Whether a registered server has the NCCL variables that it must share with the trainer."""

import os

from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.serving.registry import RegisteredServer
from exprl_megatron.utils.accelerator import uses_cuda
from exprl_megatron.utils.cuda_environment import shared_text


def nccl_difference(server: RegisteredServer, config: ServerConfig) -> str | None:
    """Return the sentence for the user where the server, started on another machine or by hand, has other values than
    this process.

    `config` is that of the servers that get the trainer's weights, of which this is one.
    """
    own = shared_text(os.environ, config.extra_args, config.tp)
    if server.nccl in ("", own) or not uses_cuda():
        return None
    return (
        f"{server.name} ({server.url}) was started with {server.nccl}, but this trainer has {own}: if weights go over "
        f"NCCL, groups of the two may fail or hang. Set these variables alike for `exprl train` and `exprl serve`."
    )
