"""Checks a run's config against its models; of each model only config.json is read."""

from collections.abc import Iterator

from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.serving import SCORED_BELOW_ROOM, ServerConfig
from exprl_megatron.config.stages import RlStage
from exprl_megatron.errors import UserError
from exprl_megatron.models.architecture import Architecture, layout_violations, position_violations, read_architecture
from exprl_megatron.models.precision_matrix import Setting, precision_violations
from exprl_megatron.models.routing import replay_violations
from exprl_megatron.models.served_policy import served_violations
from exprl_megatron.policy.delta_net_kernels import kernel_violations
from exprl_megatron.policy.gradient_fusion import fusion_violations
from exprl_megatron.utils.accelerator import cuda_capability, uses_cuda

_OTHER_MODEL = ("--json-model-override-args", "--model-path", "--model", "--model-impl")
"""Arguments of SGLang that choose the model, its settings or its class; a later one takes the place of ours."""


def model_violations(config: RunConfig) -> list[str]:
    """Return one sentence for each setting that the model does not allow: layout, precision, lengths."""
    try:
        architecture = read_architecture(config.policy.model)
    except UserError as error:
        return [str(error)]
    return [
        *layout_violations(architecture, config.policy.layout),
        *_precision_violations(config, architecture),
        *fusion_violations(config.policy, uses_cuda()),
        *kernel_violations(architecture, uses_cuda()),
        *_length_violations(config, architecture),
        *_fused_rotation_violations(config, architecture),
        *_other_model_violations(config),
        *served_violations(config, architecture, uses_cuda()),
        *replay_violations(config, architecture),
    ]


def _length_violations(config: RunConfig, architecture: Architecture) -> Iterator[str]:
    positions = architecture.max_positions
    longest, slots = config.policy.max_tokens, config.server.max_total_tokens
    yield from position_violations(architecture, longest, config.policy.model)
    if not config.has_ref_server:
        return
    # A whole trace is a prompt to the server that scores the reference policy.
    for what, room in (("the model's positions", positions), ("server.max_total_tokens", slots)):
        if room is not None and longest > room - SCORED_BELOW_ROOM:
            yield (
                f"policy.max_tokens is {longest} but the server for the reference policy scores at most "
                f"{room - SCORED_BELOW_ROOM} tokens ({SCORED_BELOW_ROOM} fewer than {what}, {room}); lower it, or set "
                f"policy.ref_policy to host."
            )


def _fused_rotation_violations(config: RunConfig, architecture: Architecture) -> Iterator[str]:
    """Yield the conflicts with SGLang's fused kernel: it treats every RoPE scaling as YaRN, with
    max_position_embeddings.
    """
    name = "--enable-fused-qk-norm-rope"
    if architecture.family == "qwen3-moe" and architecture.rope_scaling and name in config.server.extra_options:
        yield (
            f"server.extra_args has {name}, whose kernel computes the scaled positions of {config.policy.model} "
            f"differently from the trainer; remove it."
        )


def _other_model_violations(config: RunConfig) -> Iterator[str]:
    """Yield the arguments with which sampling servers would have other settings or weights than the trainer."""
    for name in _OTHER_MODEL:
        if name in config.server.extra_options:
            yield (
                f"server.extra_args has {name}, with which servers compute another model than the trainer; remove it, "
                f"and change {config.policy.model}/config.json or policy.model instead."
            )


def _precision_violations(config: RunConfig, architecture: Architecture) -> list[str]:
    capability = None
    if config.policy.precision.fp8:
        capability = cuda_capability()
    return precision_violations(
        Setting(
            config.policy,
            capability,
            optimizers=[stage.optimizer for stage in config.stages],
            architecture=architecture,
            starting_weights=any(isinstance(stage, RlStage) and stage.needs_ref_policy for stage in config.stages),
            cuda=uses_cuda(),
            servers=_servers(config),
            colocated=config.needs_sampling_servers and config.placement.kind == "colocated",
        )
    )


def _servers(config: RunConfig) -> dict[str, ServerConfig]:
    """Return the servers that the run starts with weights in the policy's format, by their config keys."""
    found = {}
    if config.needs_sampling_servers or config.has_ref_server:
        found["server"] = config.server
    if config.needs_judge and config.required_judge.has_servers:
        found["judge.server"] = config.required_judge.server
    return found
