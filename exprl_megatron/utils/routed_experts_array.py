"""The experts that a sampling server chose for the tokens of a sequence, as a read-only array."""

import numpy as np


def routed_experts_array(value: np.ndarray | None, tokens: int) -> np.ndarray | None:
    """Return `value` as a read-only array [tokens - 1, layers, top_k]: the last token was sampled, and read by no
    layer.

    Raises:
        ValueError: it has another shape, or is not of integers.
    """
    if value is None:
        return None
    experts = np.asarray(value).view()
    rows = max(tokens - 1, 0)
    if experts.ndim != 3 or len(experts) != rows or not np.issubdtype(experts.dtype, np.integer):
        raise ValueError(
            f"routed_experts is of shape {experts.shape} and {experts.dtype}, not [{rows}, layers, top_k] of integers "
            f"for {tokens} tokens"
        )
    experts.flags.writeable = False
    return experts
