"""Commands from the trainer to the custom weight loader in a server, which receives weights into its parameters.

The server is a stock one, started with SGLang's `--custom-weight-loader` naming our function (LOADER).
`/update_weights_from_tensor` calls it on each tensor-parallel rank with the `payload` of a command.

A command names an address that the server connects to. So it is executed only with an authentication code over all of
it, made with the key of the server's requests, and only once: by this start of the server, after all commands with a
lower number.
"""

import base64
import json
import pickle
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from exprl_megatron.utils.authentication import mac, verify_mac

LOADER = "exprl_megatron.serving.loader.load"
NOT_FOLLOWED = "set sync.transport to broadcast"
"""The remedy: the last words of the error of a server whose own loader cannot be traced."""

ABORTED = "aborted"
"""Record in the trainer's store, written when the trainer has aborted a sync, so that no rank waits for it."""

RECORDS = "weights"
"""Purpose of the records in that store; their secret is in each command."""


_PURPOSE = "command of the weight loader"


class RequiredSlice(NamedTuple):
    """A rectangle of a Hugging Face tensor (a vector counts as one column) that a server's rank holds."""

    name: str
    row: int
    rows: int
    column: int
    columns: int


class CommandRefused(Exception):
    """A command is not executed; the message says why."""


class CommandNumbers:
    """Increasing numbers, also from one process of the trainer to the next one on another machine."""

    def __init__(self):
        self._last = 0
        self._lock = threading.Lock()

    def next(self) -> int:
        """Return a number greater than all before it."""
        with self._lock:
            self._last = max(self._last + 1, time.time_ns())
            return self._last


class CommandGate:
    """Admits commands on a server's rank. `start` identifies this start of the server."""

    def __init__(self, key: str | None, start: int):
        self._key = key
        self._start = start
        self._last = 0

    def admit(self, signed: str) -> dict[str, Any]:
        """Return the command in `signed`.

        Raises:
            CommandRefused: it is not signed with the key, or not new.
        """
        if not self._key:
            raise CommandRefused("this server has no key; start it with exprl serve")
        claimed, _, text = signed.partition(" ")
        try:
            authentic = verify_mac(bytes.fromhex(claimed), self._key, _PURPOSE, text.encode())
        except ValueError:
            authentic = False
        if not authentic:
            raise CommandRefused("it has no authentication code of this server's key")
        command = json.loads(text)
        if command["start"] != self._start:
            raise CommandRefused("it is for another start of this server")
        if command["number"] <= self._last:
            raise CommandRefused("it, or a later one, was executed before")
        self._last = command["number"]
        return command


def signed(command: Mapping[str, Any], key: str, start: int, number: int) -> str:
    """Return `command` after its authentication code, for the server with `key` whose start is `start`."""
    text = json.dumps({**command, "start": start, "number": number})
    return f"{mac(key, _PURPOSE, text.encode()).hex()} {text}"


def payload(text: str) -> str:
    """Encode a signed command as one rank's named tensors, as `/update_weights_from_tensor` expects them."""
    return base64.b64encode(pickle.dumps([(text, _NoTensor())])).decode("ascii")


class _NoTensor:
    """Placeholder for the tensor that SGLang expects: unpickled, it is an empty tensor on any machine."""

    def __reduce__(self):
        # Only the sender of commands needs torch.
        import torch

        return torch.Tensor, ()
