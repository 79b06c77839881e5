"""`python -m sglang.launch_server` that takes its API key from a file.

SGLang's own `--api-key` shows the key in the list of processes and in the log. What follows the argument parser is
SGLang's `__main__`.
"""

import os
import sys

from exprl_megatron.serving.keys import KEY_FILE, read_key


def main() -> None:
    """Serve until the process is ended."""
    import torch
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    # What was forked has the threads of the process that imported torch, whatever its own environment says.
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    load_plugins()
    arguments = prepare_server_args(sys.argv[1:])
    arguments.api_key = read_key(os.environ[KEY_FILE])
    try:
        run_server(arguments)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
