"""The policy: its model, its layout over ranks, its precision and its optimizer."""

from typing import Literal

from pydantic import Field, PositiveInt

from exprl_megatron.config.base import Config
from exprl_megatron.config.precision import PrecisionConfig


class Layout(Config):
    """Parallel layout of the policy; world size = tp x cp x dp x pp, tp innermost, pp outermost.

    Experts are laid over the same ranks in another way: etp x ep x (what remains is their data parallelism).
    """

    tp: PositiveInt = 1
    """Tensor-parallel size: ranks that share each layer's matrices."""
    pp: PositiveInt = 1
    """Pipeline-parallel size: groups of ranks that share the layers."""
    vpp: PositiveInt = 1
    """Virtual pipeline stages for each rank; 1 is the plain pipeline."""
    cp: PositiveInt = 1
    """Ranks that share one sequence."""
    ep: PositiveInt = 1
    """Ranks that share the experts of a layer."""
    etp: PositiveInt = 1
    """Ranks that share one expert's matrices."""
    dp: PositiveInt = 1
    """Data-parallel size: copies of the policy, each of which takes a part of the batch."""
    sequence_parallel: bool = False
    """Split norms and dropout over the tensor-parallel ranks by tokens, as Megatron's option of that name does."""
    embedding_as_layer: bool = False
    """The first pipeline stage has one layer less, for the embedding."""
    head_as_layer: bool = False
    """The last pipeline stage has one layer less, for the output layer."""

    @property
    def world_size(self) -> int:
        """Number of trainer processes."""
        return self.tp * self.cp * self.dp * self.pp

    @property
    def stages(self) -> int:
        """Pieces into which the pipeline cuts the layers."""
        return self.pp * self.vpp

    @property
    def edp(self) -> int:
        """Data-parallel size of the experts."""
        return self.tp * self.cp * self.dp // (self.etp * self.ep)

    def violations(self, run_config) -> list[str]:
        found = []
        if self.vpp > 1 and self.pp == 1:
            found.append(f"policy.layout.vpp is {self.vpp} but pp is 1; virtual stages need pp of 2 or more.")
        if self.sequence_parallel and self.tp == 1:
            found.append("policy.layout.sequence_parallel needs tp of 2 or more; set tp, or turn it off.")
        if (self.embedding_as_layer or self.head_as_layer) and self.pp == 1:
            found.append("policy.layout.embedding_as_layer and head_as_layer need pp of 2 or more; leave them out.")
        stage, experts = self.tp * self.cp * self.dp, self.etp * self.ep
        if stage % experts:
            found.append(
                f"policy.layout.ep x etp is {experts}, which does not divide the {stage} ranks of a pipeline stage "
                f"(tp x cp x dp); change one of them."
            )
        if self.ep > 1 and self.tp > 1 and not self.sequence_parallel:
            found.append("policy.layout.ep with tp needs sequence_parallel; turn it on.")
        return found


class PolicyConfig(Config):
    """The trained model."""

    model: str
    """Directory in Hugging Face form: config.json, tokenizer and safetensors."""
    initialize: Literal["weights", "random"] = "weights"
    """`random` needs only config.json and the tokenizer: for SFT from scratch."""
    layout: Layout = Layout()
    precision: PrecisionConfig = PrecisionConfig()
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that are computed again in the backward pass: none, those of the attention core, or all layers."""
    max_tokens: PositiveInt = 2048
    """Longest sequence, prompt and response together."""
    micro_batch_tokens: PositiveInt = 8192
    """Tokens in one micro-batch of one data-parallel rank, padding included."""
    log_prob_chunk: PositiveInt | None = None
    """Tokens whose logits exist at the same time; by default as many as 256 MB hold for a block of the vocabulary."""
    packing: bool = True
    """Pack the sequences of a micro-batch into one row instead of padding each of them to the longest."""
    ref_policy: Literal["host", "server"] = "host"
    """Where the reference policy (a stage's weights at its start, frozen) scores traces for the KL term: `host`
    swaps its weights in from host memory, `server` uses a separate server."""
    gradient_accumulation_fusion: bool | None = None
    """Add weight gradients to the fp32 buffers within the matrix product, in bf16 on CUDA; needs apex. None: where apex
    is installed."""
    moe_aux_loss: float = Field(0.0, ge=0)
    """Weight of the router's load-balancing loss (mixture of experts).

    The loss is taken of each micro-batch, padding included, and averaged over a step's tokens: other than the
    policy's own loss it depends on which sequences share a micro-batch.
    """
    router_replay: bool | None = None
    """Of a mixture of experts: the trainer uses the experts that the sampling server chose for each token (R3). None:
    where the model has experts and the servers return their choice; a run records which."""


class OptimizerConfig(Config):
    """AdamW and its learning-rate schedule; the defaults are the paper's."""

    lr: float = Field(1e-6, gt=0)
    """Learning rate after the warm-up."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """The learning rate after the warm-up: constant, or a decay to `min_lr_ratio`."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps with a linearly growing learning rate."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Where a decaying schedule would be one step after the last, as a share of `lr`: no step has the rate 0."""
    warmup_from_zero: bool = False
    """Step s (from 0) of a warm-up has s / warmup_steps of the rate instead of (s + 1) / warmup_steps: the schedules of
    transformers, verl and Megatron, whose first step learns nothing."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the moving averages of the gradient and of its square."""
    eps: float = Field(1e-8, gt=0)
    """What is added to the root of the second moment."""
    weight_decay: float = Field(0.01, ge=0)
    """Of matrices alone; see `decay_norms_and_biases`."""
    decay_norms_and_biases: bool = False
    """Let vectors (norms, biases) decay like matrices, as verl's FSDP backend does; Megatron and transformers' Trainer
    leave them out."""
    clip_grad_norm: float = Field(1.0, gt=0)
    """Largest norm of the whole gradient."""
    distributed: bool = True
    """Shard the optimizer state over data-parallel ranks."""
    overlap: bool = False
    """Reduce gradients and gather parameters while the backward and forward pass compute; needs `distributed`."""
    offload: float = Field(0.0, ge=0, le=1)
    """Share of the optimizer state that is kept and stepped in host memory."""

    def violations(self, run_config) -> list[str]:
        return [
            f"optimizer.{name} needs optimizer.distributed; turn that on, or leave {name} out."
            for name in ("overlap", "offload")
            if getattr(self, name) and not self.distributed
        ]
