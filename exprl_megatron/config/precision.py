"""The number format in which the policy computes."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from exprl_megatron.config.base import Config
from exprl_megatron.utils.accelerator import uses_cuda

PrecisionKind = Literal["fp32", "bf16", "fp8-delayed", "fp8-tensorwise", "fp8-blockwise", "mxfp8"]


def default_kind(cuda: bool) -> PrecisionKind:
    """Return the kind that `auto` stands for with CUDA and without."""
    return "bf16" if cuda else "fp32"


class PrecisionConfig(Config):
    """`precision: bf16` is short for `precision: {kind: bf16}`.

    The fp8 kinds keep weights, norms, attention and the output layer in bf16 and multiply the linear layers'
    operands in 8 bits.
    """

    kind: Literal["auto", PrecisionKind] = "auto"
    """`auto` is bf16 on CUDA and fp32 on a CPU; a run records which."""
    fp8_parameters: bool = False
    """Keep the linear layers' weights in 8 bits only (the optimizer holds fp32 ones)."""
    first_last_bf16: int = Field(0, ge=0)
    """Number of layers at either end that stay in bf16."""
    fp8_attention: bool = False
    """Attention's own products in 8 bits too."""
    emulate: bool = False
    """On a machine without FP8 kernels: round the operands as the kind would, and multiply in fp32."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @property
    def fp8(self) -> bool:
        """Whether linear layers multiply in 8 bits."""
        return self.kind not in ("auto", "fp32", "bf16")

    @property
    def dtype(self) -> Literal["fp32", "bf16"]:
        """The format of parameters and activations outside FP8 products; emulation computes in fp32.

        That of `auto` is this machine's.
        """
        kind = self.resolved().kind
        return "fp32" if kind == "fp32" or self.emulate else "bf16"

    def resolved(self, cuda: bool | None = None) -> Self:
        """Return the config with `auto` replaced, for this machine unless `cuda` is given."""
        if self.kind != "auto":
            return self
        return self.model_copy(update={"kind": default_kind(uses_cuda() if cuda is None else cuda)})

    def violations(self, run_config) -> list[str]:
        return self._emulation_violations(run_config.policy) if self.emulate else []

    def _emulation_violations(self, policy) -> list[str]:
        found = []
        if not self.fp8:
            found.append(f"policy.precision.emulate has nothing to emulate for {self.kind}; choose an fp8 kind.")
        for name in ("fp8_parameters", "fp8_attention"):
            if getattr(self, name):
                found.append(f"policy.precision.{name} is not emulated; turn it or emulate off.")
        if self.kind == "fp8-delayed" and policy.recompute == "full" and policy.layout.pp > 1:
            found.append(
                "policy.precision fp8-delayed is not emulated with recompute full and pp of 2 or more, as the repeated "
                "forward pass would find newer scales; choose another recompute, kind or pp."
            )
        return found
