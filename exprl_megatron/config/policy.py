"""The model that learns: where its weights are, how it is laid out over ranks, its precision."""

from typing import Literal

from pydantic import Field, PositiveInt

from exprl_megatron.config.base import Config


class Layout(Config):
    """How the policy is spread over ranks; world size = tp x pp x dp (cp and ep are 1 so far)."""

    tp: PositiveInt = 1
    pp: PositiveInt = 1
    vpp: PositiveInt = 1
    """Virtual pipeline stages for each rank; 1 is the plain pipeline."""
    dp: PositiveInt = 1
    sequence_parallel: bool = False

    @property
    def world_size(self) -> int:
        """Number of trainer processes."""
        return self.tp * self.pp * self.dp

    def violations(self, whole) -> list[str]:
        found = []
        if self.vpp > 1 and self.pp == 1:
            found.append(f"policy.layout.vpp is {self.vpp} but pp is 1; virtual stages need pp of 2 or more.")
        if self.sequence_parallel and self.tp == 1:
            found.append("policy.layout.sequence_parallel needs tp of 2 or more; set tp, or turn it off.")
        return found


class PolicyConfig(Config):
    """The trained model."""

    model: str
    """Directory in Hugging Face form: config.json, tokenizer and safetensors."""
    initialise: Literal["weights", "random"] = "weights"
    """`random` needs only config.json and the tokenizer: for SFT from nothing."""
    layout: Layout = Layout()
    precision: Literal["fp32", "bf16"] = "fp32"
    recompute: Literal["none", "selective", "full"] = "none"
    max_tokens: PositiveInt = 2048
    """Longest sequence, prompt and response together."""
    micro_batch_tokens: PositiveInt = 8192
    """Padded tokens in one micro-batch of one data-parallel rank."""
    log_prob_chunk: PositiveInt = 1024
    """Tokens whose logits exist at the same time."""


class OptimizerConfig(Config):
    """AdamW and its learning-rate schedule; the defaults are the paper's."""

    lr: float = Field(1e-6, gt=0)
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Last learning rate of a decaying schedule, as a share of `lr`."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    clip_grad_norm: float = Field(1.0, gt=0)
    distributed: bool = True
    """Shard the optimizer state over data-parallel ranks."""
