"""`python -m sglang_router.launch_router` that takes its API key from a file; it requires the key of its clients and
passes it on.
"""

import os
import sys

from exprl_megatron.serving.keys import KEY_FILE, read_key


def main() -> None:
    """Route until the process is ended."""
    from sglang_router.launch_router import launch_router, parse_router_args

    arguments = parse_router_args(sys.argv[1:])
    arguments.api_key = str(read_key(os.environ[KEY_FILE]))
    launch_router(arguments)


if __name__ == "__main__":
    main()
