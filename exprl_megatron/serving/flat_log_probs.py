"""Log-probs and ids of sampled tokens as base64 of arrays, which a server with the plugin exprl_flat_log_probs sends.

SGLang itself writes a list [log-prob, id, null] for each token, in about 34 bytes, of which 20 are decimal digits of a
float32, and the id again in `output_ids`. As arrays both take 11 bytes and no parsing, and `output_ids` is empty. They
are requested by fields that SGLang has for top log-probs. Without the plugin these fields change nothing where no top
log-probs are requested, and the reply is SGLang's own; SGLang's router does not forward them.
"""

import numpy as np

from exprl_megatron.serving.base64_field import cut_base64

FLAT_REQUESTED = {
    "return_flat_raw_output_top_logprobs": True,
    "return_flat_raw_top_logprobs_b64": True,
}
"""The fields of a request for them."""
LOG_PROBS, IDS = "output_token_logprobs_val_flat_b64", "output_token_logprobs_idx_flat_b64"


def cut_flat_log_probs(body: bytes) -> tuple[bytes, tuple[np.ndarray, np.ndarray] | None]:
    """Return the reply `body` without them, and (log-probs, float32 [tokens], ids, int32 [tokens]); None: it has none.

    Raises:
        ValueError: one of the two is missing or is there more than once, is not base64 of whole numbers, or they differ
            in their number.
    """
    body, log_probs = cut_base64(body, LOG_PROBS)
    body, ids = cut_base64(body, IDS)
    if log_probs is None and ids is None:
        return body, None
    if log_probs is None or ids is None:
        raise ValueError(f"{LOG_PROBS if log_probs is None else IDS} is missing")
    if len(log_probs) != len(ids) or len(ids) % 4:
        raise ValueError(f"{LOG_PROBS} has {len(log_probs)} bytes and {IDS} {len(ids)}, which must be 4 for each token")
    return body, (np.frombuffer(log_probs, "<f4"), np.frombuffer(ids, "<i4"))
