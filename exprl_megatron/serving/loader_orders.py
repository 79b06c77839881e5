"""What trainer and server tell each other while a server receives weights straight into its parameters.

The server is a stock one, started with SGLang's `--custom-weight-loader` naming our function (LOADER), which
`/update_weights_from_tensor` calls on each tensor-parallel rank with what `payload` makes of an order.
"""

import base64
import json
import pickle
from typing import Any, NamedTuple

LOADER = "exprl_megatron.serving.loader.load"
NOT_FOLLOWED = "set sync.transport to broadcast"
"""Ends what a server says that cannot find out where its own loader puts weights: the remedy."""

BROKEN_OFF = "broken off"
"""Key of the trainer's store that is there once the trainer has given a sync up: who waits for it in vain goes on."""


class Need(NamedTuple):
    """A rectangle of a Hugging Face tensor (a vector counts as one column) that a server's rank holds."""

    name: str
    row: int
    rows: int
    column: int
    columns: int


def payload(order: dict[str, Any]) -> str:
    """`order` in the form of one rank's named tensors, as `/update_weights_from_tensor` takes them."""
    return base64.b64encode(pickle.dumps([(json.dumps(order), _NoTensor())])).decode("ascii")


class _NoTensor:
    """Stands where SGLang wants a tensor: unpickled it is an empty one, on any machine."""

    def __reduce__(self):
        import torch

        return torch.Tensor, ()
