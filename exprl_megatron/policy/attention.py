"""Attention on machines without CUDA: rows of one sequence or of several, whole or cut by context parallelism."""

from itertools import groupby

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention

from exprl_megatron.policy.context_parallel import chunk_count, natural_order, own_chunks


def has_window(config: TransformerConfig, layer_number: int) -> bool:
    """Return whether attention of the layer (Megatron counts from 1) sees a window, and its positions are not
    stretched.
    """
    return is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)


class CausalAttention(MegatronModule):
    """Causal attention with grouped queries by torch's scaled_dot_product_attention.

    The sequences of a packed row do not see each other; neighbors of the same length are computed together. Each is
    padded on its right, so causality alone keeps real tokens from seeing padding. Under context parallelism keys and
    values are gathered from all ranks of the group. In a layer with a window each token sees as many as Megatron's
    config says, itself the last of them.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        softmax_scale: float | None = None,
        pg_collection=None,
        **_,
    ):
        super().__init__(config=config)
        # Megatron counts the tokens before a token, as FlashAttention does.
        self.window = config.window_size[0] + 1 if has_window(config, layer_number) else None
        self.softmax_scale = softmax_scale
        self.group = pg_collection.cp if pg_collection else parallel_state.get_context_parallel_group()

    def forward(
        self, query, key, value, attention_mask=None, *, packed_seq_params: PackedSeqParams | None = None, **_
    ) -> torch.Tensor:
        """query: [sequence, batch, heads, head_dim]; key, value: with groups for heads; returns [s, b, heads * dim].

        With `packed_seq_params` the inputs have no batch dimension (b is 1 in what is returned); its cu_seqlens_q
        are those of the whole row, s is this rank's part of it.
        """
        cp = self.group.size()
        lengths = [len(query) * cp] if packed_seq_params is None else packed_seq_params.cu_seqlens_q.diff().tolist()
        if cp > 1:
            order = natural_order(lengths, cp)
            key, value = (gather_from_sequence_parallel_region(t, group=self.group)[order] for t in (key, value))
        if packed_seq_params is None:
            return self._of_like_length(*(tensor.transpose(0, 1) for tensor in (query, key, value))).transpose(0, 1)
        runs = [(length, len(list(run))) for length, run in groupby(lengths)]
        tensors = zip(split_runs(query, runs, cp), split_runs(key, runs), split_runs(value, runs), strict=True)
        return _joined([self._of_like_length(*run).flatten(0, 1) for run in tensors], dim=0).unsqueeze(1)

    def _of_like_length(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Compute sequences of one length: query [count, length / cp, heads, head_dim] -> [count, length / cp, heads *
        dim].
        """
        cp, rank = self.group.size(), self.group.rank()
        size = key.shape[1] // chunk_count(cp)
        parts = []
        for chunk, part in zip(own_chunks(cp, rank), query.split(size, dim=1), strict=True):
            seen = (chunk + 1) * size
            parts.append(self._last_queries(part, key[:, :seen], value[:, :seen]))
        return _joined(parts, dim=1).flatten(2)

    def _last_queries(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Compute causal attention, [count, s, heads, head_dim], where the queries belong to the last of the keys."""
        rows, columns = query.shape[1], key.shape[1]
        mask = None
        if rows != columns or (self.window is not None and self.window < columns):
            mask = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
        if mask is not None and self.window is not None:
            mask = mask.triu(columns - rows - self.window + 1)
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale, enable_gqa=True
        ).transpose(1, 2)


def split_runs(packed: torch.Tensor, runs: list[tuple[int, int]], cp: int = 1) -> list[torch.Tensor]:
    """Return [tokens, heads, head_dim] as [count, length / cp, heads, head_dim] for each (length, count) of
    neighbors.
    """
    tokens = packed.split([length // cp * count for length, count in runs])
    return [run.unflatten(0, (count, -1)) for run, (_, count) in zip(tokens, runs, strict=True)]


def _joined(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    """Concatenate; a single tensor is returned without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
