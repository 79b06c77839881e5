"""The experts that a server chose for each token, as SGLang's `return_routed_experts` returns them."""

from itertools import combinations

import numpy as np

from exprl_megatron.config.serving import RETURN_ROUTED_EXPERTS
from exprl_megatron.models.routing import Routing

_SENT = np.dtype("<i4")


def sent_bytes(tokens: int, routing: Routing) -> int:
    """Bytes that the experts of `tokens` have in a reply, in base64."""
    return tokens * routing.layers * routing.top_k * _SENT.itemsize * 4 // 3 + 4


def read_routed_experts(sent: bytes | None, tokens: int, routing: Routing) -> np.ndarray:
    """[tokens - 1, layers, top_k], uint8 or int16: the experts of the `tokens` of prompt and response but the last.

    Raises ValueError where they were not sent, are of another number, or a token has not `top_k` different experts of
    the model's in each layer.
    """
    if sent is None:
        raise ValueError(f"routed_experts is missing; a server returns it with {RETURN_ROUTED_EXPERTS}")
    rows, ids = max(tokens - 1, 0), np.frombuffer(sent, _SENT)
    if len(ids) != rows * routing.layers * routing.top_k:
        raise ValueError(
            f"routed_experts has {len(ids)} ids, but {rows} tokens have {routing.top_k} experts in each of "
            f"{routing.layers} layers"
        )
    if len(ids) and not 0 <= ids.min() <= ids.max() < routing.experts:
        raise ValueError(f"routed_experts has an id that is none of the {routing.experts} experts'")
    experts = ids.astype(routing.dtype).reshape(rows, routing.layers, routing.top_k)
    columns = np.ascontiguousarray(experts[:, routing.dense_layers :].reshape(-1, routing.top_k).T)
    if any((columns[i] == columns[j]).any() for i, j in combinations(range(routing.top_k), 2)):
        raise ValueError("routed_experts has the same expert twice for a token")
    return experts
