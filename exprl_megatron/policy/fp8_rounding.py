"""Rounding to 8-bit floats and back, scaled as Transformer Engine's recipes scale.

Everything here is fp32 in, fp32 out, on any device. `E4M3` has 3 mantissa bits and reaches to 448, `E5M2` has 2
and reaches to 57344; a number is multiplied by a scale, cast (what is too large becomes the largest), and divided
by the scale again. The scale brings the largest magnitude of a block, its amax, to the largest of the format.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
import torch.distributed as dist

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Role = Literal["input", "weight", "gradient"]
"""Which operand of a linear layer's products: its input, its weight, or the gradient of its output."""
HYBRID: dict[Role, torch.dtype] = {"input": E4M3, "weight": E4M3, "gradient": E5M2}
_LARGEST = torch.finfo(torch.float32).max


class Rounding(Protocol):
    """How a linear layer's operands are rounded."""

    def __call__(self, operand: torch.Tensor, role: Role, training: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return `operand` [rows, columns] rounded for a product that sums over its columns, and for one over its rows.

        The second is None unless `training`: only the backward pass needs it.
        """


@dataclass(frozen=True)
class Tensorwise:
    """One scale for the whole tensor, from its own amax (Float8CurrentScaling); hybrid formats."""

    def __call__(self, operand, role, training):
        once = round_blocks(operand, tuple(operand.shape), HYBRID[role])
        return once, once if training else None


@dataclass(frozen=True)
class Blockwise:
    """E4M3; one scale for each `length` numbers that a product sums over, the last of a row may be fewer."""

    length: int
    square_weights: bool
    """Weights have one scale for each length x length numbers instead, the same for both products."""
    scale: Callable[[torch.Tensor, torch.dtype], torch.Tensor]

    def __call__(self, operand, role, training):
        if role == "weight" and self.square_weights:
            once = round_blocks(operand, (self.length, self.length), E4M3, self.scale)
            return once, once if training else None
        over_columns = round_blocks(operand, (1, self.length), E4M3, self.scale)
        return over_columns, round_blocks(operand, (self.length, 1), E4M3, self.scale) if training else None


@dataclass
class Delayed:
    """One scale for the whole tensor, from the amax that it had in the training pass before; hybrid formats.

    DelayedScaling with Megatron's defaults (a history of one amax, no margin). One instance serves one linear
    layer. The amax is the largest over `group`, whose ranks must make the same passes in the same order.
    """

    group: dist.ProcessGroup | None = None
    scales: dict[Role, torch.Tensor] = field(default_factory=lambda: {role: torch.ones(()) for role in HYBRID})
    """For the next pass."""

    def __call__(self, operand, role, training):
        once = cast_round_trip(operand, self.scales[role], HYBRID[role])
        if training:
            self._learn(operand, role)
        return once, once if training else None

    def _learn(self, operand: torch.Tensor, role: Role) -> None:
        amax = operand.abs().amax() if operand.numel() else operand.new_zeros(())
        if self.group is not None and self.group.size() > 1:
            dist.all_reduce(amax, dist.ReduceOp.MAX, group=self.group)
        if amax.isfinite() and amax > 0:
            self.scales[role] = scale_of_amax(amax, HYBRID[role])


def round_blocks(
    values: torch.Tensor,
    block: tuple[int, int],
    dtype: torch.dtype,
    scale: Callable[[torch.Tensor, torch.dtype], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return `values` [rows, columns] with each block of `block` rows x columns rounded to `dtype` under its own scale.

    Blocks at the lower and right edge hold what is left. `scale` makes a scale of an amax (default: scale_of_amax).
    """
    rows, columns = values.shape
    if not values.numel():
        return values.clone()
    height, width = block
    padded = torch.nn.functional.pad(values, (0, -columns % width, 0, -rows % height))
    blocks = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
    amax = blocks.abs().amax(dim=(1, 3), keepdim=True)
    rounded = cast_round_trip(blocks, (scale or scale_of_amax)(amax, dtype), dtype)
    return rounded.view_as(padded)[:rows, :columns]


def cast_round_trip(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return cast(values * scale) / scale in the shape and dtype of `values`, saturating; NaN stays NaN."""
    largest = torch.finfo(dtype).max
    return (values * scale).clamp(-largest, largest).to(dtype).to(values.dtype) * scale.reciprocal()


def scale_of_amax(amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the largest number of `dtype` divided by `amax`, fp32 in its shape, at most fp32's largest; 1 where amax
    is 0 or not finite.
    """
    # Number / tensor would be number * (1 / tensor) to torch: rounded twice.
    scale = torch.full_like(amax, torch.finfo(dtype).max).div(amax).clamp(max=_LARGEST)
    return torch.where(amax.isfinite() & (amax > 0), scale, torch.ones_like(scale))


def power_of_two_scale(amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return scale_of_amax, in the shape of `amax`, rounded down to a power of two (Float8BlockScaling)."""
    _, exponent = torch.frexp(scale_of_amax(amax, dtype))
    return torch.ldexp(torch.ones_like(amax), exponent - 1)


def e8m0_scale(amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return 1 / (amax / the largest of `dtype`), in the shape of `amax`, as MXFP8BlockScaling computes it.

    The quotient is rounded up to a power of two from 2^-127 to 2^127; the scale that is stored, E8M0, is the
    reciprocal.
    A block that contains NaN gets NaN.
    """
    least = amax * (1 / torch.finfo(dtype).max)
    mantissa, exponent = torch.frexp(least)
    exponent = (exponent - (mantissa == 0.5).to(exponent.dtype)).clamp(-127, 127)
    exponent = torch.where(least.isinf(), 127, torch.where(least == 0, -127, exponent))
    scale = torch.ldexp(torch.ones_like(amax), -exponent)
    return torch.where(amax.isnan(), amax, scale)
