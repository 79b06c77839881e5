"""Attention on machines without CUDA: rows of one sequence or of several, whole or cut by context parallelism."""

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from exprl_megatron.policy.context_parallel import chunk_count, natural_order, own_chunks


class CausalAttention(MegatronModule):
    """Causal attention with grouped queries by torch's scaled_dot_product_attention.

    The sequences of a packed row do not see each other. Each is padded on its right, so causality alone keeps real
    tokens from seeing padding. Under context parallelism keys and values are gathered from all ranks of the group.
    """

    def __init__(self, config: TransformerConfig, *, softmax_scale: float | None = None, pg_collection=None, **_):
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.group = pg_collection.cp if pg_collection else parallel_state.get_context_parallel_group()

    def forward(
        self, query, key, value, attention_mask=None, *, packed_seq_params: PackedSeqParams | None = None, **_
    ) -> torch.Tensor:
        """query: [sequence, batch, heads, head_dim]; key, value: with groups for heads; returns [s, b, heads * dim].

        With `packed_seq_params` the inputs have no batch dimension (b is 1 in what is returned); its cu_seqlens_q
        are those of the whole row, s is this rank's part of it.
        """
        cp, rank = self.group.size(), self.group.rank()
        if packed_seq_params is None:
            lengths = [len(query) * cp]
        else:
            query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
            lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        if cp > 1:
            order = natural_order(lengths, cp)
            key, value = (gather_from_sequence_parallel_region(t, group=self.group)[order] for t in (key, value))
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        queries = query.split([length // cp for length in lengths], dim=2)
        sequences = zip(lengths, queries, key.split(lengths, dim=2), value.split(lengths, dim=2), strict=True)
        parts = []
        for length, q, k, v in sequences:
            size = length // chunk_count(cp)
            for chunk, part in zip(own_chunks(cp, rank), q.split(size, dim=2), strict=True):
                seen = (chunk + 1) * size
                parts.append(self._last_queries(part, k[:, :, :seen], v[:, :, :seen]))
        return torch.cat(parts, dim=2).permute(2, 0, 1, 3).flatten(2)

    def _last_queries(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Causal attention, [b, heads, s, head_dim], where the queries belong to the last of the keys."""
        rows, columns = query.shape[2], key.shape[2]
        mask = None if rows == columns else torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale, enable_gqa=True
        )
