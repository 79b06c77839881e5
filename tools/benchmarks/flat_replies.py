"""Replies of /generate with log-probs as arrays (serving/flat_log_probs.py) in the form of SGLang's own, and back."""

import base64

import numpy as np

from exprl_megatron.serving.flat_log_probs import IDS, LOG_PROBS


def listed(reply: dict) -> bool:
    """Give a decoded reply the lists that SGLang itself sends; returns whether it had arrays."""
    meta = reply["meta_info"]
    if IDS not in meta:
        return False
    log_probs, ids = (
        np.frombuffer(base64.b64decode(meta.pop(name)), kind).tolist()
        for name, kind in ((LOG_PROBS, "<f4"), (IDS, "<i4"))
    )
    meta["output_token_logprobs"] = [list(entry) for entry in zip(log_probs, ids, [None] * len(ids), strict=True)]
    reply["output_ids"] = reply["output_ids"] or ids
    return True


def flatten(reply: dict) -> None:
    """Give a decoded reply arrays; ids that differ from those of its log-probs are kept as a list."""
    meta = reply["meta_info"]
    log_probs, ids = ([entry[place] for entry in meta["output_token_logprobs"]] for place in (0, 1))
    if reply["output_ids"] == ids:
        reply["output_ids"] = []
    for name, values, kind in ((LOG_PROBS, log_probs, "<f4"), (IDS, ids, "<i4")):
        meta[name] = base64.b64encode(np.array(values, kind).tobytes()).decode()
    meta["output_token_logprobs"] = []
