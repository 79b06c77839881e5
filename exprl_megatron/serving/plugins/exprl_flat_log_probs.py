"""SGLang plugin: log-probs and ids of sampled tokens are sent as base64 of arrays to clients that request it.

Found through the `.dist-info` beside it, in every process of a server whose PYTHONPATH has this directory. A request
for flat top log-probs of the output in base64, but of no top log-probs, gets those of the sampled tokens in that form
instead of the lists `output_token_logprobs` and `output_ids`; exprl_megatron/serving/flat_log_probs.py reads them.
Every other reply is SGLang's own.
"""

import base64

IDS = "output_token_logprobs_idx_flat_b64"


def activate() -> None:
    """Change how SGLang's tokenizer process writes the log-probs of a reply."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    writer = "sglang.srt.managers.tokenizer_manager.TokenizerManager.add_logprob_to_meta_info"
    HookRegistry.register(writer, _add_flat, HookType.AROUND)
    sender = "sglang.srt.managers.tokenizer_manager.TokenizerManager._wait_one_response"
    HookRegistry.register(sender, _send_ids_once, HookType.AROUND)


def _add_flat(original, manager, meta_info, state, top_logprobs_num, *arguments, finished, **named):
    if top_logprobs_num or not _requested(state.obj):
        original(manager, meta_info, state, top_logprobs_num, *arguments, finished=finished, **named)
        return
    log_probs, ids = state.output_token_logprobs_val, state.output_token_logprobs_idx
    # SGLang makes a tuple of each token that it finds here.
    state.output_token_logprobs_val = []
    try:
        original(manager, meta_info, state, top_logprobs_num, *arguments, finished=finished, **named)
    finally:
        state.output_token_logprobs_val = log_probs
    if finished:
        meta_info.update(flat(log_probs, ids))


def _send_ids_once(original, manager, request, *arguments, **named):
    state = manager.rid_to_state[request.rid]
    outputs = original(manager, request, *arguments, **named)
    return _without_ids(outputs, state) if getattr(request, "return_logprob", False) else outputs


async def _without_ids(outputs, state):
    """Leave out the `output_ids` of a reply that are those beside its flat log-probs."""
    async for output in outputs:
        if IDS in output["meta_info"] and output["output_ids"] == state.output_token_logprobs_idx:
            output = output | {"output_ids": []}
        yield output


def _requested(request) -> bool:
    return (
        not request.stream and request.return_flat_raw_output_top_logprobs and request.return_flat_raw_top_logprobs_b64
    )


def flat(log_probs, ids) -> dict:
    """The fields for the log-probs (floats) and ids (integers) of a reply's tokens.

    Names and types are like those of SGLang's flat top log-probs.
    """
    import numpy as np

    arrays = {"val": np.array(log_probs, "<f4"), "idx": np.array(ids, "<i4")}
    fields = {
        f"output_token_logprobs_{name}_flat_b64": base64.b64encode(array.tobytes()).decode()
        for name, array in arrays.items()
    }
    return fields | {"output_token_logprobs_length": len(ids)}
