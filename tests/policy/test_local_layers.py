"""What a decoder layer's own pieces compute is what torch, transformers and Megatron's unpacked rows say."""

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from exprl_megatron.policy.local_layers import RotationTable, SwiGlu
from exprl_megatron.policy.rotation import rotate_packed_row, rotate_rows, rotation_table


def test_swiglu_and_its_gradient_are_those_of_torch():
    torch.manual_seed(0)
    hidden = torch.randn(5, 2, 12, dtype=torch.float64, requires_grad=True)
    gate, up = hidden.chunk(2, dim=-1)
    assert torch.equal(SwiGlu()(hidden), torch.nn.functional.silu(gate) * up)
    assert torch.autograd.gradcheck(SwiGlu(), hidden)


def test_every_sequence_of_a_packed_row_begins_at_position_0(world):
    rotary = RotationTable(8, rotary_percent=1.0, use_cpu_initialization=True)
    begins = torch.tensor([0, 3, 8, 9], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=begins, cu_seqlens_kv=begins, max_seqlen_q=5)
    table = rotary(rotary.get_rotary_seq_len(None, None, None, None, packed), packed_seq=True)
    alone = rotary(5)
    assert torch.equal(table, torch.cat([alone[:3], alone, alone[:1]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_that_of_transformers(dtype):
    torch.manual_seed(0)
    angles, states = torch.randn(7, 6), torch.randn(7, 2, 3, 12).to(dtype)
    cos, sin = (values.repeat(1, 2)[None] for values in (angles.cos(), angles.sin()))
    query = states.double().permute(1, 2, 0, 3)
    expected, _ = apply_rotary_pos_emb(query, query, cos, sin)
    found = rotate_rows(states, rotation_table(angles))
    assert found.dtype == dtype
    precision = {torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    assert torch.allclose(found.double().permute(1, 2, 0, 3), expected, atol=precision, rtol=precision)
    assert torch.equal(rotate_packed_row(states[:, 0], torch.tensor([0, 7]), rotation_table(angles)), found[:, 0])


def test_the_gradient_of_a_rotation_is_turned_back():
    torch.manual_seed(0)
    states = torch.randn(5, 1, 2, 4, dtype=torch.float64, requires_grad=True)
    table = rotation_table(torch.randn(5, 2, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda s: rotate_rows(s, table), states)
