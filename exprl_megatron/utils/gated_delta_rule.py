"""The gated delta rule (arXiv 2412.06464) in plain torch, a chunk of tokens at a time."""

import torch
from torch.nn.functional import pad

_EPS = 1e-6
"""Of the length of queries and keys, as flash-linear-attention and transformers have it."""


def of_length_one(heads: torch.Tensor) -> torch.Tensor:
    """Return [..., dim] divided by its length, in fp32."""
    heads = heads.float()
    return heads * torch.rsqrt(heads.square().sum(-1, keepdim=True) + _EPS)


def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None = None,
    chunk: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs [count, tokens, heads, value_dim] and the last states, fp32, of sequences that begin with
    `state`.

    The state S of each is [heads, key_dim, value_dim]; None: zeros. Token by token S = exp(decay) S, then
    S += beta k (v - S' k)', and the output is S' q / sqrt(key_dim) (equation 10 of the paper, in its transpose). query
    and key [count, tokens, heads, key_dim] have length 1 each; `decay`, which is not positive, and `beta` are
    [count, tokens, heads]. Within `chunk` tokens the corrections of all are one triangular system (section 3.3).
    """
    tokens, chunk = query.shape[1], min(chunk, query.shape[1])
    # [count, heads, chunks, chunk, dim], and without the last dimension.
    query, key, value, beta, decay = (_chunks(tensor, chunk) for tensor in (query, key, value, beta, decay))
    query = query * query.shape[-1] ** -0.5
    total = decay.cumsum(-1)
    above = torch.ones(chunk, chunk, dtype=torch.bool, device=query.device).triu(1)
    # exp(total_i - total_j) where j <= i: what is left of token j's write when token i reads.
    left = (total[..., :, None] - total[..., None, :]).masked_fill(above, -torch.inf).exp()
    weighted = key * beta[..., None]
    system = (weighted @ key.mT) * left
    read = weighted * total.exp()[..., None]
    both = torch.cat((value * beta[..., None], read), dim=-1)
    written, read = torch.linalg.solve_triangular(system, both, upper=False, unitriangular=True).split(
        (value.shape[-1], key.shape[-1]), dim=-1
    )
    within = (query @ key.mT) * left
    query = query * total.exp()[..., None]
    key = key * (total[..., -1:] - total).exp()[..., None]
    kept = total[..., -1].exp()[..., None, None]
    outputs = []
    for number in range(query.shape[2]):
        correction = written[:, :, number]
        if state is not None:
            correction = correction - read[:, :, number] @ state
        output = within[:, :, number] @ correction
        outputs.append(output if state is None else output + query[:, :, number] @ state)
        added = key[:, :, number].mT @ correction
        state = added if state is None else state * kept[:, :, number] + added
    assert state is not None
    return torch.cat(outputs, dim=2)[:, :, :tokens].transpose(1, 2), state


def _chunks(tensor: torch.Tensor, chunk: int) -> torch.Tensor:
    """Reshape [count, tokens, heads, ...] to fp32 [count, heads, chunks, chunk, ...].

    It is filled with zeros, which leave a state as it is.
    """
    moved = tensor.transpose(1, 2).float()
    missing = -moved.shape[2] % chunk
    if missing:
        moved = pad(moved, (0, 0) * (moved.dim() - 3) + (0, missing))
    return moved.unflatten(2, (-1, chunk))
