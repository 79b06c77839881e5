"""The experts that a server chose for each token, as the replies to `return_routed_experts` have them.

SGLang sends each id as int32; a server with the plugin exprl_compact_experts sends one or two bytes an id, and their
number in a last byte. At the size of Qwen3-235B they are nearly all of a reply, so they are cut out of it before
anything else looks at it.
"""

from itertools import combinations

import numpy as np

from exprl_megatron.config.serving import RETURN_ROUTED_EXPERTS
from exprl_megatron.models.routing import Routing
from exprl_megatron.serving.base64_field import cut_base64

_SENT: np.dtype = np.dtype("<i4")
_COMPACT: dict[int, np.dtype] = {1: np.dtype(np.uint8), 2: np.dtype("<i2")}
"""The dtype of ids by their number of bytes."""


def sent_bytes(tokens: int, routing: Routing) -> int:
    """Return the most bytes that the experts of `tokens` have in a reply, in base64."""
    return tokens * routing.layers * routing.top_k * _SENT.itemsize * 4 // 3 + 4


def cut_routed_experts(body: bytes) -> tuple[bytes, bytearray | None]:
    """Return the reply `body` with null for its routed experts, and their bytes; None where it has none.

    Raises:
        ValueError: they are there more than once, or are not a string in base64.
    """
    return cut_base64(body, "routed_experts")


def read_routed_experts(sent: bytes | bytearray | None, tokens: int, routing: Routing) -> np.ndarray:
    """Return [tokens - 1, layers, top_k], uint8 or int16: the experts of the `tokens` of prompt and response but the
    last.

    Raises:
        ValueError: they were not sent, are of another number, or a token has not `top_k` different experts of the
            model's in each layer.
    """
    if sent is None:
        raise ValueError(f"routed_experts is missing; a server returns it with {RETURN_ROUTED_EXPERTS}")
    rows = max(tokens - 1, 0)
    ids = _ids(sent, rows * routing.layers * routing.top_k, routing, rows)
    if len(ids) and not 0 <= ids.min() <= ids.max() < routing.experts:
        raise ValueError(f"routed_experts has an id that is none of the {routing.experts} experts'")
    experts = ids.astype(routing.dtype, copy=False).reshape(rows, routing.layers, routing.top_k)
    columns = np.ascontiguousarray(experts[:, routing.dense_layers :].reshape(-1, routing.top_k).T)
    if any((columns[i] == columns[j]).any() for i, j in combinations(range(routing.top_k), 2)):
        raise ValueError("routed_experts has the same expert twice for a token")
    return experts


def _ids(sent: bytes | bytearray, count: int, routing: Routing, rows: int) -> np.ndarray:
    """Return [count] ids of the kind that `sent` has."""
    kind, end = _SENT, len(sent)
    # The last byte of an int32 is 0, as no model has 2^24 experts.
    if sent and sent[-1] in _COMPACT:
        kind, end = _COMPACT[sent[-1]], end - 1
    if end != count * kind.itemsize:
        raise ValueError(
            f"routed_experts has {end} bytes, {end // kind.itemsize} ids of {kind.name}, but {rows} tokens have "
            f"{routing.top_k} experts in each of {routing.layers} layers"
        )
    return np.frombuffer(sent, kind, count)
