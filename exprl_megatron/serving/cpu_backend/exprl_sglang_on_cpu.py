"""SGLang plugin for a plain CPU: deterministic inference with a request's seed, faster arithmetic, a faster start."""

import multiprocessing


def activate() -> None:
    """Allow the `torch_native` attention backend, let it compute whole batches, and fork processes.

    The Triton matrix products are left out, as Triton compiles for GPUs only. The cost is that a result
    does not depend on the batch it was computed in; what stays is that the sampler draws from the request's own seed.
    """
    import exprl_cpu_attention
    import exprl_cpu_delta_net
    import exprl_cpu_linear
    import exprl_cpu_shared_expert
    from sglang.srt.arg_groups import choices
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from exprl_megatron.utils.gloo_device import share_gloo_device

    share_gloo_device()
    choices.add_deterministic_attention_backend_choices(["torch_native"])
    choices.add_radix_supported_deterministic_attention_backend_choices(["torch_native"])
    HookRegistry.register(
        "sglang.srt.model_executor.model_runner.ModelRunner.maybe_enable_batch_invariant_mode",
        lambda runner: None,
        HookType.REPLACE,
    )
    backend = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
    HookRegistry.register(f"{backend}.init_forward_metadata", exprl_cpu_attention.forget_plans, HookType.BEFORE)
    HookRegistry.register(f"{backend}._run_sdpa_forward_decode", exprl_cpu_attention.decode, HookType.AROUND)
    HookRegistry.register(f"{backend}._run_sdpa_forward_extend", exprl_cpu_attention.extend, HookType.AROUND)
    HookRegistry.register(
        "sglang.srt.layers.quantization.unquant.UnquantizedLinearMethod.apply",
        exprl_cpu_linear.linear,
        HookType.AROUND,
    )
    HookRegistry.register(
        "sglang.srt.layers.logits_processor.LogitsProcessor._compute_lm_head",
        exprl_cpu_linear.output_layer,
        HookType.AROUND,
    )
    HookRegistry.register(
        "sglang.kernels.ops.attention.fla.layernorm_gated.layernorm_fn",
        exprl_cpu_delta_net.norm_of_output,
        HookType.REPLACE,
    )
    HookRegistry.register(
        "sglang.kernels.ops.elementwise.elementwise.fused_gate_sigmoid_mul_add",
        exprl_cpu_shared_expert.add_gated,
        HookType.REPLACE,
    )
    HookRegistry.register("sglang.srt.entrypoints.engine._set_envs_and_config", _fork, HookType.AFTER)
    HookRegistry.register("sglang.srt.state_capturer.base.BaseHostCache.__init__", _plain_memory, HookType.BEFORE)


def _plain_memory(*_, **__) -> None:
    """Use plain memory for routed experts: SGLang registers it with CUDA, whatever the device, and would die."""
    from sglang.srt.mem_cache.pool_host import common

    common.ALLOC_MEMORY_FUNCS["cpu"] = _allocate


def _allocate(dims, dtype, device, pin_memory, allocator, registration_granularity_bytes=None):
    return allocator.allocate(dims, dtype=dtype, device=device)


def _fork(*_) -> None:
    """Fork in place of SGLang's spawn, which CUDA needs: each process would import for 7 s what the first one has."""
    multiprocessing.set_start_method("fork", force=True)
