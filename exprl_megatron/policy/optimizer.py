"""Megatron's AdamW for a stage, and what its checkpoints need: padded buckets, and torch's AdamW beneath it."""

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from exprl_megatron.config.policy import OptimizerConfig
from exprl_megatron.errors import UserError
from exprl_megatron.policy.precision import optimizer_settings


def build_optimizer(config: OptimizerConfig, chunks: Sequence[DistributedDataParallel]) -> MegatronOptimizer:
    """Return a fresh optimizer on the chunks' current weights; `set_learning_rates` says what decays.

    Raises:
        UserError: its state should be offloaded from a GPU and there is none.
    """
    parameter = next(chunks[0].parameters())
    dtype = parameter.dtype
    if config.offload and not parameter.is_cuda:
        raise UserError(
            f"optimizer.offload is {config.offload}, but on a machine without GPU the optimizer is in host memory "
            f"anyway; set it to 0."
        )
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_eps=config.eps,
            clip_grad=config.clip_grad_norm,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=config.distributed,
            **optimizer_settings(chunks[0].config),
            overlap_param_gather=config.overlap,
            **_offload(config),
        ),
        list(chunks),
    )
    for part in _parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            _number_within_groups(part)
            _save_padding_between_buckets(part)
    for part in _torch_adam_parts(optimizer):
        _create_state(part.optimizer)
        if isinstance(part, DistributedOptimizer):
            _accept_states_without_step(part)
    return optimizer


def _offload(config: OptimizerConfig) -> dict:
    """Keep a share of the parameters' fp32 weights, gradients and moments in host memory and step them there."""
    if not config.offload:
        return {}
    return {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": config.offload,
        "overlap_cpu_optimizer_d2h_h2d": True,
        # The hybrid optimizer keeps fp32 weights of its own; Megatron then makes no further ones.
        "use_precision_aware_optimizer": True,
    }


def set_learning_rates(optimizer: MegatronOptimizer, config: OptimizerConfig, learning_rate: float) -> None:
    """Set the next step's rates. Megatron's `wd_mult` is 0 for vectors (norms, biases) and 1 for matrices."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        share = 1.0 if config.decay_norms_and_biases else group.get("wd_mult", 1.0)
        group["weight_decay"] = config.weight_decay * share


def separate_step_counters(optimizer: MegatronOptimizer) -> None:
    """Give every parameter its own step counter; call after loading a checkpoint.

    DistributedOptimizer.load_state_dict hands one tensor to all of them, and torch's AdamW counts in place:
    each step would then count once for every parameter.
    """
    for part in _torch_adam_parts(optimizer):
        for state in part.optimizer.state.values():
            state["step"] = state["step"].clone()


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Return the optimizers that Megatron chains."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _torch_adam_parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Return the parts of the optimizer that have torch's AdamW beneath."""
    return [part for part in _parts(optimizer) if isinstance(part.optimizer, torch.optim.AdamW)]


def _number_within_groups(part: DistributedOptimizer) -> None:
    """Make Megatron look for a parameter's state at its own place, also in groups with parameters of two dtypes.

    Megatron 0.19.2 numbers a group's parameters in the order of its buffers, which has bf16 first, and gives its
    optimizer those in fp32 first: where a group has both, it would save one parameter's state as another's.
    """
    numbers = part.model_param_group_index_map
    for group in part.opt_group_ranges:
        # As _build_model_and_main_param_groups orders them.
        ordered = sorted(group["params"], key=lambda parameter: parameter.dtype != torch.float32)
        for number, parameter in enumerate(ordered):
            numbers[parameter] = numbers[parameter][0], number


def _save_padding_between_buckets(part: DistributedOptimizer) -> None:
    """Store what is gathered for a checkpoint at the places where its parameters are looked for.

    Megatron pads each bucket of a buffer to a multiple of the data-parallel ranks and 128, leaves the padding out of
    what it gathers, and cuts the parameters out at their places with padding: everything behind a padded bucket would
    be saved shifted. Tied embeddings on the last pipeline stage are such a bucket.
    """
    gather = part.get_parameter_state_dp_zero

    def gather_with_padding(*args, **kwargs):
        state = gather(*args, **kwargs)
        for index, buffer in enumerate(part.buffers if state is not None else ()):
            for tensors in state[index].values():
                for name, packed in tensors.items():
                    if torch.is_tensor(packed):
                        tensors[name] = _with_padding(packed, buffer)
        return state

    part.get_parameter_state_dp_zero = gather_with_padding


def _with_padding(packed: torch.Tensor, buffer) -> torch.Tensor:
    """Return all buckets, concatenated without padding, each at its offset in the buffer."""
    sizes = [bucket.numel_unpadded for bucket in buffer.buckets]
    if all(bucket.offset == sum(sizes[:number]) for number, bucket in enumerate(buffer.buckets)):
        return packed
    padded = packed.new_zeros(buffer.numel)
    for bucket, part in zip(buffer.buckets, packed.split(sizes), strict=True):
        padded[bucket.offset : bucket.offset + len(part)] = part
    return padded


def _create_state(adam: torch.optim.AdamW) -> None:
    """Create AdamW's state, which exists only after the first step but which DistributedOptimizer reads before."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            adam.state[parameter] = {"step": torch.tensor(0.0), **zeros}


def _accept_states_without_step(part: DistributedOptimizer) -> None:
    """Accept a reshardable checkpoint that keeps `step` once, where the loader looks for one per parameter."""
    load = part._set_main_param_and_optimizer_states

    def load_with_step(model_param, tensors):
        group, place = part.model_param_group_index_map[model_param]
        main_param = part.optimizer.param_groups[group]["params"][place]
        load(model_param, {"step": part.optimizer.state[main_param]["step"], **tensors})

    part._set_main_param_and_optimizer_states = load_with_step
