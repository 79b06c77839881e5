"""Overlap of communication and computation: gradients are reduced while the backward pass still runs, weights gathered
while the forward pass already does.

Megatron's hooks begin a reduction when the last micro-batch's gradient of a bucket is there, and wait for a
bucket's weights when a module is about to read them. Code that reads weights in another way must gather them first.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel

from exprl_megatron.config.policy import OptimizerConfig
from exprl_megatron.policy.precision import ddp_settings

BUCKET_PARAMETERS: int | None = None
"""Parameters whose gradients are reduced together; None: as many as Megatron finds right."""


def wrap(chunks: Sequence[GPTModel], config: OptimizerConfig) -> list[DistributedDataParallel]:
    """Return the chunks in Megatron's data parallelism, wired for the optimizer that `config` describes."""
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=config.distributed,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.overlap,
        overlap_param_gather=config.overlap,
        bucket_size=BUCKET_PARAMETERS,
        **ddp_settings(chunks[0].config),
    )
    wrapped = [
        # Only the first chunk's reductions delay the next step.
        DistributedDataParallel(chunk.config, settings, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    if config.overlap:
        _begin_reductions_in_the_last_backward(wrapped)
        for chunk in wrapped:
            _wait_for_the_output_layer(chunk)
    return wrapped


def is_wrapped_for(wrapped: Sequence[DistributedDataParallel], config: OptimizerConfig) -> bool:
    """Return whether `wrapped` is what wrap would make for `config`."""
    settings = wrapped[0].ddp_config
    made_for = (settings.use_distributed_optimizer, settings.overlap_grad_reduce)
    return made_for == (config.distributed, config.overlap)


def gather_weights(wrapped: Sequence[DistributedDataParallel]) -> None:
    """Wait until every rank has the last update's weights; a collective, to precede reading them outside a forward."""
    for chunk in wrapped:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


@contextmanager
def no_grad_sync(wrapped: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Keep gradients from being reduced within the block, since more will be added to them."""
    config = wrapped[0].config
    functions = config.no_sync_func, config.grad_sync_func
    config.no_sync_func = config.grad_sync_func = None
    try:
        with ExitStack() as stack:
            for chunk in wrapped:
                stack.enter_context(chunk.no_sync())
            yield
    finally:
        config.no_sync_func, config.grad_sync_func = functions


def _begin_reductions_in_the_last_backward(wrapped: list[DistributedDataParallel]) -> None:
    """Set when reductions may begin for Megatron's schedules, which read the first chunk's config.

    In a pipeline all stages begin at the same time, so that none holds up the others.
    """
    config = wrapped[0].config
    if len(wrapped) == 1:
        config.no_sync_func, config.grad_sync_func = wrapped[0].no_sync, wrapped[0].start_grad_sync
    else:
        config.no_sync_func = [chunk.no_sync for chunk in wrapped]
        config.grad_sync_func = [chunk.start_grad_sync for chunk in wrapped]


def _wait_for_the_output_layer(chunk: DistributedDataParallel) -> None:
    """Wait for the output layer with the final norm: the loss reads its weight without calling the layer."""
    model = chunk.module
    if model.post_process:
        wait = chunk._make_forward_pre_hook()

        def wait_for_weight(*_) -> None:
            wait(model.output_layer)

        model.decoder.final_layernorm.register_forward_pre_hook(wait_for_weight)
