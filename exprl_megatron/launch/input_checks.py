"""Checks a run's inputs in a separate process, so that the launcher never holds tokenizers and data sets.

It runs as `python -m exprl_megatron.launch.input_checks`: it receives a config over the file descriptor in the variable
CHANNEL, and sends its answer back over it.
"""

import json
import os
import socket
import sys
from typing import Any

from exprl_megatron.config.load import check_config
from exprl_megatron.config.run import RunConfig
from exprl_megatron.errors import RunStopped, UserError, storage_sentence
from exprl_megatron.processes.child import die_with_parent
from exprl_megatron.processes.starter import Starter

INPUT_CHECKS = "exprl_megatron.launch.input_checks"
CHANNEL = "EXPRL_INPUT_CHECKS"
_PARENT = "EXPRL_INPUT_CHECKS_PARENT"


def hash_checked_inputs(config: RunConfig, starter: Starter) -> dict[str, str]:
    """Return `hash_inputs` of `config`, after `check_inputs`.

    Raises:
        UserError: see `check_inputs` and `hash_inputs`.
        RunStopped: the process ended without an answer.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = starter.start(
            "input-checks",
            [sys.executable, "-m", INPUT_CHECKS],
            os.environ | {_PARENT: str(os.getpid())},
            None,
            None,
            grace_s=None,
            inherited={CHANNEL: theirs.fileno()},
        )
        theirs.close()
        try:
            ours.sendall(config.model_dump_json().encode())
            ours.shutdown(socket.SHUT_WR)
            answer = _read(ours)
        finally:
            child.kill()
            status = child.wait()
    if not answer:
        raise RunStopped(f"The process that checks the run's inputs ended with status {status}; see its output.")
    return _contents(json.loads(answer))


def _contents(answer: dict[str, Any]) -> dict[str, str]:
    if "user_error" in answer:
        raise UserError(answer["user_error"])
    return answer["contents"]


def main() -> None:
    """Answer with the hashes, or with an error that the user can fix; other errors end the process with a traceback."""
    die_with_parent(int(os.environ[_PARENT]))
    from exprl_megatron.launch.input_hashes import hash_inputs
    from exprl_megatron.launch.preflight import check_inputs
    from exprl_megatron.problems.sources import cached_sources

    with socket.socket(fileno=int(os.environ[CHANNEL])) as channel:
        config = check_config(json.loads(_read(channel)), "the run's config")
        try:
            with cached_sources():
                check_inputs(config)
                answer: dict[str, dict[str, str] | str] = {"contents": hash_inputs(config)}
        except UserError as error:
            answer = {"user_error": str(error)}
        except OSError as error:
            if (sentence := storage_sentence(error, config.directory)) is None:
                raise
            answer = {"user_error": sentence}
        channel.sendall(json.dumps(answer).encode())


def _read(channel: socket.socket) -> bytes:
    pieces = []
    while piece := channel.recv(2**20):
        pieces.append(piece)
    return b"".join(pieces)


if __name__ == "__main__":
    main()
