"""What trainer and server tell each other while a server receives weights straight into its parameters.

The server is a stock one, started with SGLang's `--custom-weight-loader` naming our function (LOADER), which
`/update_weights_from_tensor` calls on each tensor-parallel rank with what `payload` makes of an order.

An order names an address that the server connects to. So it is carried out only with an authentication code over the
whole of it, made with the key of the server's requests, and only once: by this start of the server, after all orders
with a lower number.
"""

import base64
import json
import pickle
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from exprl_megatron.utils.authentication import code, is_code

LOADER = "exprl_megatron.serving.loader.load"
NOT_FOLLOWED = "set sync.transport to broadcast"
"""Ends what a server says that cannot find out where its own loader puts weights: the remedy."""

BROKEN_OFF = "broken off"
"""Record in the trainer's store, written once the trainer has given a sync up: a rank that waits for it goes on."""

RECORDS = "weights"
"""What the records in that store are for; their secret is in each order."""


_PURPOSE = "order of the weight loader"


class Need(NamedTuple):
    """A rectangle of a Hugging Face tensor (a vector counts as one column) that a server's rank holds."""

    name: str
    row: int
    rows: int
    column: int
    columns: int


class OrderRefused(Exception):
    """An order that a server does not carry out, as a sentence."""


class OrderNumbers:
    """Numbers that rise, also from one process of the trainer to the next one on another machine."""

    def __init__(self):
        self._last = 0
        self._lock = threading.Lock()

    def next(self) -> int:
        """A number above all before it."""
        with self._lock:
            self._last = max(self._last + 1, time.time_ns())
            return self._last


class OrderGate:
    """What a server's rank asks before it carries an order out. `start` identifies this start of the server."""

    def __init__(self, key: str | None, start: int):
        self._key = key
        self._start = start
        self._last = 0

    def admit(self, signed: str) -> dict[str, Any]:
        """The order in `signed`. Raises OrderRefused where its code is not the key's, or it is not a new one."""
        if not self._key:
            raise OrderRefused("this server has no key; start it with exprl serve")
        claimed, _, text = signed.partition(" ")
        try:
            authentic = is_code(bytes.fromhex(claimed), self._key, _PURPOSE, text.encode())
        except ValueError:
            authentic = False
        if not authentic:
            raise OrderRefused("it has no authentication code of this server's key")
        order = json.loads(text)
        if order["start"] != self._start:
            raise OrderRefused("it is for another start of this server")
        if order["number"] <= self._last:
            raise OrderRefused("it, or a later one, was given before")
        self._last = order["number"]
        return order


def signed(order: Mapping[str, Any], key: str, start: int, number: int) -> str:
    """`order`, behind its authentication code, for the server that has `key` and whose start is `start`."""
    text = json.dumps({**order, "start": start, "number": number})
    return f"{code(key, _PURPOSE, text.encode()).hex()} {text}"


def payload(text: str) -> str:
    """A signed order in the form of one rank's named tensors, as `/update_weights_from_tensor` takes them."""
    return base64.b64encode(pickle.dumps([(text, _NoTensor())])).decode("ascii")


class _NoTensor:
    """Takes the place of a tensor that SGLang wants: unpickled it is an empty one, on any machine."""

    def __reduce__(self):
        # Only who sends orders needs it.
        import torch

        return torch.Tensor, ()
