"""SGLang plugin: the routed experts of a reply are sent in as few bytes an id as hold them, not in four.

Found through the `.dist-info` beside it, in every process of a server whose PYTHONPATH has this directory. The ids of a
reply are followed by one byte, the size of an id. It distinguishes them from SGLang's own int32, whose last byte is 0;
exprl_megatron/serving/routed_experts.py reads both.
"""


def activate() -> None:
    """Compact the ids in the detokenizer, off the loop that feeds the GPU."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    handler = "sglang.srt.managers.detokenizer_manager.DetokenizerManager.handle_batch_token_id_out"
    HookRegistry.register(handler, _compact_all, HookType.BEFORE)


def _compact_all(_, batch) -> None:
    if batch.routed_experts is not None:
        batch.routed_experts = [None if ids is None else compact(ids) for ids in batch.routed_experts]


def compact(ids):
    """Return `ids`, an int32 tensor, as bytes (uint8 [count x size + 1]): each in `size` bytes, 1 or 2, and `size` at
    last.

    `ids` itself where one fits into neither.
    """
    import torch

    low, high = (int(bound) for bound in ids.aminmax()) if ids.numel() else (0, 0)
    if low < 0 or high > torch.iinfo(torch.int16).max:
        return ids
    dtype = torch.uint8 if high <= torch.iinfo(torch.uint8).max else torch.int16
    narrow = ids.to(dtype).flatten().view(torch.uint8)
    return torch.cat((narrow, narrow.new_tensor([dtype.itemsize])))
