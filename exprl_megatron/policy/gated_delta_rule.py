"""The gated delta rule (arXiv 2412.06464) in plain torch, a chunk of tokens at a time."""

import torch
from torch.nn.functional import pad

from exprl_megatron.models.delta_net import CHUNK


def gated_delta_rule(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """The outputs [count, tokens, heads, value_dim], fp32, of sequences that each begin with an empty state S.

    Token by token S = exp(decay) S, then S += beta k (v - S' k)', and the output is S' q / sqrt(key_dim) (equation 10
    of the paper, in its transpose). query and key [count, tokens, heads, key_dim] have length 1 each; `decay`, which is
    not positive, and `beta` are [count, tokens, heads]. Within a chunk the corrections of all tokens are one triangular
    system (section 3.3).
    """
    tokens, chunk = query.shape[1], min(CHUNK, query.shape[1])
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
    state = torch.zeros(())
    outputs = []
    for number in range(query.shape[2]):
        correction = written[:, :, number]
        if number:
            correction = correction - read[:, :, number] @ state
        output = within[:, :, number] @ correction
        outputs.append(output + query[:, :, number] @ state if number else output)
        added = key[:, :, number].mT @ correction
        state = state * kept[:, :, number] + added if number else added
    return torch.cat(outputs, dim=2)[:, :, :tokens].transpose(1, 2)


def _chunks(tensor: torch.Tensor, chunk: int) -> torch.Tensor:
    """[count, tokens, heads, ...] -> fp32 [count, heads, chunks, chunk, ...], filled with zeros."""
    moved = tensor.transpose(1, 2).float()
    missing = -moved.shape[2] % chunk
    if missing:
        moved = pad(moved, (0, 0) * (moved.dim() - 3) + (0, missing))
    return moved.unflatten(2, (-1, chunk))
