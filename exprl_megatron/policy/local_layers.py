"""Two pieces of a decoder layer as a machine without CUDA computes them quickest; what they compute is Megatron's."""

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams

from exprl_megatron.policy.context_parallel import own_columns
from exprl_megatron.policy.rotation import rotation_table


class RotationTable(RotaryEmbedding):
    """What queries and keys are turned by (see rotation.py), made once for all layers."""

    def get_rotary_seq_len(self, context, decoder, hidden, config, packed_seq_params: PackedSeqParams | None = None):
        """What `forward` gets: the length of the padded rows, or of a packed row the lengths of its sequences."""
        if packed_seq_params is None:
            return super().get_rotary_seq_len(context, decoder, hidden, config)
        return tuple(packed_seq_params.cu_seqlens_q.diff().tolist())

    def get_emb(self, max_seq_len: int | tuple[int, ...], offset: int = 0) -> torch.Tensor:
        """[tokens, 1, 1, 2 x turning dimensions], fp32: each sequence begins at position 0.

        Of a packed row the tokens that this context-parallel rank holds; of padded rows all, `forward` cuts them.
        """
        if isinstance(max_seq_len, int):
            return rotation_table(self.get_freqs_non_repeated(max_seq_len, offset))
        cp, rank = self.cp_group.size(), self.cp_group.rank()
        positions = torch.cat([own_columns([length], cp, rank) for length in max_seq_len])
        return rotation_table(self.get_freqs_non_repeated(max(max_seq_len)))[positions]


class SwiGlu(torch.nn.Module):
    """silu(gate) * up, where [..., 2 x ffn] holds both halves, whose gradient is written in one piece."""

    def __init__(self, config=None):
        super().__init__()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., 2 x ffn] -> [..., ffn]."""
        return _SwiGlu.apply(hidden)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = hidden.chunk(2, dim=-1)
        activated = torch.nn.functional.silu(gate)
        ctx.save_for_backward(hidden, activated)
        return activated * up

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        hidden, activated = ctx.saved_tensors
        gate, up = hidden.chunk(2, dim=-1)
        found = torch.empty_like(hidden)
        of_gate, of_up = found.chunk(2, dim=-1)
        torch.mul(grad, activated, out=of_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=of_gate)
        return found
