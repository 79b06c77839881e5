"""SGLang plugin: deterministic inference, and with it the seed of a request, on a plain CPU."""


def activate() -> None:
    """Allow the `torch_native` attention backend and leave out the Triton matrix products.

    Triton compiles for GPUs only. What this gives up is that a result does not depend on the batch it
    was computed in; what stays is that the sampler draws from the request's own seed.
    """
    from sglang.srt.arg_groups import choices
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    choices.add_deterministic_attention_backend_choices(["torch_native"])
    choices.add_radix_supported_deterministic_attention_backend_choices(["torch_native"])
    HookRegistry.register(
        "sglang.srt.model_executor.model_runner.ModelRunner.maybe_enable_batch_invariant_mode",
        lambda runner: None,
        HookType.REPLACE,
    )
