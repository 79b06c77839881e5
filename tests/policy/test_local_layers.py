"""What a decoder layer's own pieces compute is what torch and Megatron's unpacked rows say."""

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from exprl_megatron.policy.local_layers import RowRotaryEmbedding, SwiGlu


def test_swiglu_and_its_gradient_are_those_of_torch():
    torch.manual_seed(0)
    hidden = torch.randn(5, 2, 12, dtype=torch.float64, requires_grad=True)
    gate, up = hidden.chunk(2, dim=-1)
    assert torch.equal(SwiGlu()(hidden), torch.nn.functional.silu(gate) * up)
    assert torch.autograd.gradcheck(SwiGlu(), hidden)


def test_every_sequence_of_a_packed_row_begins_at_position_0(world):
    rotary = RowRotaryEmbedding(8, rotary_percent=1.0, use_cpu_initialization=True)
    begins = torch.tensor([0, 3, 8, 9], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=begins, cu_seqlens_kv=begins, max_seqlen_q=5)
    angles = rotary(rotary.get_rotary_seq_len(None, None, None, None, packed), packed_seq=True)
    alone = rotary(5)
    assert torch.equal(angles, torch.cat([alone[:3], alone, alone[:1]]))
