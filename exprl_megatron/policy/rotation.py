"""Rotary positions in three passes over memory, where Megatron looks for Transformer Engine's kernel on CUDA.

A head's vector is two halves, (x1, x2); the angle a of its position and frequency turns it to
(x1 cos a - x2 sin a, x2 cos a + x1 sin a). Its gradient is turned back by the same angle. Where only the first
dimensions of a head turn, the vector is those, and the rest stays.
"""

import torch


def rotation_table(angles: torch.Tensor) -> torch.Tensor:
    """Return [positions, 1, 1, 4 x pairs] of [positions, pairs]: the factors of the halves (x1, x2) and (x2, x1)."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos, -sin, sin), dim=-1)[:, None, None]


def rotate_rows(states: torch.Tensor, table: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Rotate states [sequence, batch, heads, head_dim] by the table of its positions; `interleaved` is not
    known here.
    """
    return _Rotation.apply(states, *table.to(states.dtype).chunk(2, dim=-1))


def rotate_packed_row(states: torch.Tensor, cu_seqlens: torch.Tensor, table: torch.Tensor, **_) -> torch.Tensor:
    """Rotate states [tokens, heads, head_dim] by the table of the tokens' positions, each in its own sequence."""
    return _Rotation.apply(states, *table[:, 0].to(states.dtype).chunk(2, dim=-1))


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(states, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1), None, None


def _turned(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: int) -> torch.Tensor:
    turning = cos.shape[-1]
    if turning < states.shape[-1]:
        turned = _turned(states[..., :turning], cos, sin, direction)
        return torch.cat((turned, states[..., turning:]), dim=-1)
    first, second = states.chunk(2, dim=-1)
    return (states * cos).addcmul_(torch.cat((second, first), dim=-1), sin, value=direction)
