"""Rotary table and SwiGLU of a decoder layer, fast without CUDA; their results are Megatron's."""

from collections.abc import Iterator

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams

from exprl_megatron.policy.context_parallel import own_columns
from exprl_megatron.policy.rotation import rotation_table


class RotationTable(RotaryEmbedding):
    """The rotary embedding of queries and keys (see rotation.py), computed once for all layers."""

    def get_rotary_seq_len(self, context, decoder, hidden, config, packed_seq_params: PackedSeqParams | None = None):
        """Return what `forward` gets: the length of the padded rows, or of a packed row the lengths of its
        sequences.
        """
        if packed_seq_params is None:
            return super().get_rotary_seq_len(context, decoder, hidden, config)
        return tuple(packed_seq_params.cu_seqlens_q.diff().tolist())

    def get_emb(self, max_seq_len: int | tuple[int, ...], offset: int = 0) -> torch.Tensor:
        """Return [tokens, 1, 1, 2 x turning dimensions], fp32: each sequence begins at position 0.

        Of a packed row the tokens that this context-parallel rank holds; of padded rows all, `forward` cuts them.
        """
        if isinstance(max_seq_len, int):
            return rotation_table(self.get_freqs_non_repeated(max_seq_len, offset))
        cp, rank = self.cp_group.size(), self.cp_group.rank()
        positions = torch.cat([own_columns([length], cp, rank) for length in max_seq_len])
        return rotation_table(self.get_freqs_non_repeated(max(max_seq_len)))[positions]


class SwiGlu(torch.nn.Module):
    """silu(gate) * up, where [..., 2 x ffn] holds both halves, a block of rows at a time.

    A block stays in the processor's cache between the operations, and nothing but the input is kept for the gradient.
    """

    def __init__(self, config=None):
        super().__init__()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the activation: [..., 2 x ffn] -> [..., ffn]."""
        return _SwiGlu.apply(hidden)


BLOCK = 2**17
"""Numbers of a block of rows in both halves (512 KiB in fp32)."""


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden)
        result = hidden.new_empty(*hidden.shape[:-1], hidden.shape[-1] // 2)
        for rows, of_rows in _blocks(hidden, result):
            gate, up = rows.chunk(2, dim=-1)
            torch.mul(torch.nn.functional.silu(gate), up, out=of_rows)
        return result

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        (hidden,) = ctx.saved_tensors
        result = hidden.new_empty(hidden.shape)
        for rows, grad_rows, of_rows in _blocks(hidden, grad, result):
            gate, up = rows.chunk(2, dim=-1)
            of_gate, of_up = of_rows.chunk(2, dim=-1)
            torch.mul(grad_rows, torch.nn.functional.silu(gate), out=of_up)
            torch.ops.aten.silu_backward.grad_input(grad_rows * up, gate, grad_input=of_gate)
        return result


def _blocks(hidden: torch.Tensor, *others: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield the same rows of `hidden` and of `others`, block after block; of a contiguous tensor they are views."""
    rows = max(1, BLOCK // hidden.shape[-1])
    return zip(*(tensor.flatten(0, -2).split(rows) for tensor in (hidden, *others)), strict=True)
