"""Which precision is supported on which GPU, layout and optimizer; checked before a process starts.

docs/precision.md says of each refusal where it comes from. Needs neither torch nor Megatron.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from exprl_megatron.config.policy import OptimizerConfig, PolicyConfig
from exprl_megatron.config.precision import PrecisionConfig
from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.models.architecture import Architecture

ADA, HOPPER, BLACKWELL, CONSUMER_BLACKWELL = (8, 9), (9, 0), (10, 0), (12, 0)
"""Compute capabilities from which on a GPU belongs to a generation."""


@dataclass(frozen=True)
class Setting:
    """All that decides whether a precision is available."""

    policy: PolicyConfig
    capability: tuple[int, int] | None
    """Compute capability of the trainers' GPUs; None: no CUDA."""
    optimizers: Sequence[OptimizerConfig] = (OptimizerConfig(),)
    """Of all stages."""
    architecture: Architecture | None = None
    """None: products are not looked at."""
    starting_weights: bool = False
    """Whether a stage keeps its starting weights on the host, for the KL term."""
    cuda: bool = False
    """Whether trainer and servers run on CUDA; for a precision that no compute capability rules out."""
    servers: Mapping[str, ServerConfig] = field(default_factory=dict)
    """The servers that hold weights in the policy's format, by their key in the config."""
    colocated: bool = False

    @property
    def precision(self) -> PrecisionConfig:
        """The precision in question."""
        return self.policy.precision


def precision_violations(setting: Setting) -> list[str]:
    """Return one sentence for each reason for which `setting` does not support its precision."""
    precision = setting.precision
    if not precision.fp8:
        return [*_without_fp8(precision), *_fp32_on_cuda(setting), *_two_dtypes(setting)]
    if setting.architecture is not None and setting.architecture.delta_net is not None:
        return [
            f"policy.precision is {precision.kind}, in which gated delta nets, as this {setting.architecture.family} "
            f"model has them, are not supported; choose bf16."
        ]
    if precision.emulate and setting.capability is None:
        return list(_layers(setting))
    checks = (_device, _layers, _parameters, _attention, _context_parallelism, _products)
    return [sentence for check in checks for sentence in check(setting)]


def _without_fp8(precision: PrecisionConfig) -> Iterator[str]:
    for name in ("fp8_parameters", "first_last_bf16", "fp8_attention"):
        if value := getattr(precision, name):
            yield (
                f"policy.precision.{name} is {value} but the precision {precision.kind} multiplies nothing in 8 bits; "
                f"leave it out, or choose an fp8 kind."
            )


def _two_dtypes(setting: Setting) -> Iterator[str]:
    """Report mixed dtypes: Megatron's plain optimizer takes one parameter's fp32 state for that of another in bf16."""
    architecture = setting.architecture
    if setting.precision.kind != "bf16" or architecture is None or architecture.delta_net is None:
        return
    if not all(optimizer.distributed for optimizer in setting.optimizers):
        yield (
            f"optimizer.distributed is false with policy.precision bf16, but this {architecture.family} model has "
            f"parameters in fp32 (A_log) beside, of which Megatron's plain optimizer writes no checkpoint; set it to "
            f"true."
        )


def _fp32_on_cuda(setting: Setting) -> Iterator[str]:
    if setting.precision.kind != "fp32" or not setting.cuda:
        return
    for name, server in setting.servers.items():
        if not server.names_attention_backend:
            yield (
                f"policy.precision is fp32, in which SGLang's attention kernels on CUDA do not compute, and {name} "
                f"would serve it; choose bf16."
            )
    if setting.colocated:
        yield (
            "policy.precision is fp32 with placement.kind colocated, which is not supported on CUDA; choose bf16, or "
            "kind separate."
        )
    if setting.policy.layout.cp > 1:
        yield (
            f"policy.precision is fp32 but policy.layout.cp is {setting.policy.layout.cp}, for which Transformer "
            f"Engine has no attention in fp32; choose bf16, or set cp to 1."
        )


def _device(setting: Setting) -> Iterator[str]:
    kind, capability = setting.precision.kind, setting.capability
    if capability is None:
        yield (
            f"policy.precision is {kind} but this machine has no CUDA device; choose bf16 or fp32, or set "
            f"policy.precision.emulate."
        )
        return
    gpu = _gpu(capability)
    if setting.precision.emulate:
        yield f"policy.precision.emulate is for machines without CUDA and this one has {gpu}; turn it off."
    if capability < ADA:
        yield f"policy.precision is {kind} but {gpu} has no FP8 products (from 8.9 on); choose bf16."
    elif kind == "fp8-blockwise" and capability < HOPPER:
        yield (
            f"policy.precision is fp8-blockwise but {gpu} has no block-scaled products (from 9.0 on); choose "
            f"fp8-tensorwise."
        )
    elif kind == "mxfp8" and capability < BLACKWELL:
        yield f"policy.precision is mxfp8 but {gpu} has no MXFP8 products (10.x has them); choose fp8-blockwise."
    elif kind == "mxfp8" and capability >= CONSUMER_BLACKWELL:
        yield f"policy.precision is mxfp8, which Transformer Engine does not support on {gpu}; choose fp8-tensorwise."


def _layers(setting: Setting) -> Iterator[str]:
    count, kind = setting.precision.first_last_bf16, setting.precision.kind
    if not count:
        return
    if kind == "fp8-delayed":
        yield (
            f"policy.precision.first_last_bf16 is {count} but fp8-delayed takes all layers or none; set it to 0, or "
            f"choose fp8-tensorwise."
        )
    if setting.architecture is not None:
        layers, pp = setting.architecture.layers, setting.policy.layout.pp
        if count > layers // pp:
            yield (
                f"policy.precision.first_last_bf16 is {count}, more than the {layers // pp} layers of a pipeline rank; "
                f"lower it."
            )


def _parameters(setting: Setting) -> Iterator[str]:
    if not setting.precision.fp8_parameters:
        return
    remedy = "turn policy.precision.fp8_parameters off"
    if setting.precision.kind == "mxfp8":
        yield f"policy.precision.fp8_parameters is not available with mxfp8, whose weights are kept in bf16; {remedy}."
    if not all(optimizer.distributed for optimizer in setting.optimizers):
        yield f"optimizer.distributed is false but FP8 parameters need the distributed optimizer; set it, or {remedy}."
    offloads = [optimizer.offload for optimizer in setting.optimizers if optimizer.offload]
    if offloads:
        yield (
            f"optimizer.offload is {max(offloads):g} but FP8 parameters cannot be stepped in host memory; set it to 0, "
            f"or {remedy}."
        )
    if setting.starting_weights and setting.policy.ref_policy == "host":
        yield (
            f"policy.ref_policy is host but FP8 parameters do not survive being swapped out and in; set it to "
            f"server, or {remedy}."
        )


def _attention(setting: Setting) -> Iterator[str]:
    kind, capability, packing = setting.precision.kind, setting.capability, setting.policy.packing
    if not setting.precision.fp8_attention or capability is None:
        return
    gpu, remedy = _gpu(capability), "turn policy.precision.fp8_attention off"
    if setting.architecture is not None and setting.architecture.window is not None:
        yield f"policy.precision.fp8_attention has no kernel for attention with windows; {remedy}."
    elif kind == "fp8-blockwise":
        yield f"policy.precision.fp8_attention has no kernel for fp8-blockwise; {remedy}."
    elif capability < HOPPER or capability >= CONSUMER_BLACKWELL:
        yield f"policy.precision.fp8_attention has no kernel on {gpu}; {remedy}."
    elif kind == "fp8-tensorwise" and capability < BLACKWELL:
        yield f"policy.precision.fp8_attention has no kernel for fp8-tensorwise on {gpu} (10.x has one); {remedy}."
    elif packing and (kind == "mxfp8" or (kind == "fp8-delayed" and capability < BLACKWELL)):
        yield (
            f"policy.packing is true but 8-bit attention for {kind} on {gpu} has no backward pass over packed "
            f"sequences; set it to false, or {remedy}."
        )


def _context_parallelism(setting: Setting) -> Iterator[str]:
    layout = setting.policy.layout
    if layout.tp > 1 and layout.cp > 1 and not layout.sequence_parallel:
        yield (
            f"policy.layout has tp {layout.tp} and cp {layout.cp} without sequence_parallel, where FP8 gives norms "
            f"gradients that are tp times too large; turn sequence_parallel on, or use bf16."
        )


def _products(setting: Setting) -> Iterator[str]:
    """Yield lengths of products that do not fit: FP8 needs multiples of 16; MXFP8 has a scale for each 32."""
    if setting.architecture is None:
        return
    kind, hidden = setting.precision.kind, setting.architecture.hidden
    multiple = 32 if kind == "mxfp8" else 16
    needs = f"policy.precision is {kind}, which needs lengths that are multiples of {multiple}, but"
    if hidden % multiple:
        yield f"{needs} the model's hidden size is {hidden}; use bf16."
    for what, size, ranks, name in _sharded_sizes(setting.architecture, setting.policy):
        if size % ranks == 0 and size // ranks % multiple:
            yield (
                f"{needs} policy.layout.{name} {ranks} leaves a rank {size // ranks} of the model's {size} {what}; "
                f"lower {name}, or use bf16."
            )


def _sharded_sizes(architecture: Architecture, policy: PolicyConfig) -> list[tuple[str, int, int, str]]:
    """Return (what, how many, ranks that share them, the setting): the lengths of the linear layers' products."""
    layout, heads = policy.layout, architecture.heads * architecture.head_dim
    qkv = heads + 2 * architecture.kv_groups * architecture.head_dim
    columns: list[tuple[str, int, int, str]] = []
    for experts in (kind.experts for kind in architecture.kinds()):
        if experts is None:
            columns.append(("MLP columns", architecture.ffn, layout.tp, "tp"))
            continue
        columns.append(("expert columns", experts.ffn, layout.etp, "etp"))
        if experts.shared_ffn:
            columns.append(("shared expert's columns", experts.shared_ffn, layout.tp, "tp"))
    return [
        ("query columns", heads, layout.tp, "tp"),
        ("query, key and value columns", qkv, layout.tp, "tp"),
        *columns,
    ]


def _gpu(capability: tuple[int, int]) -> str:
    return f"a GPU of compute capability {capability[0]}.{capability[1]}"
