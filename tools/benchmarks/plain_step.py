"""A training step as one writes it with `transformers` alone: what ours is measured against."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from exprl_megatron.algorithms.batch import MicroBatch, TrainSample, pad
from exprl_megatron.config.policy import OptimizerConfig
from exprl_megatron.policy.packing import PackingShape, plan_micro_batches


class PlainStep:
    """fp32, scaled_dot_product_attention, whole logits, log_softmax and gather, gradient clipping, torch's AdamW.

    Sequences of like length share a micro-batch of at most `micro_batch_tokens` tokens, padded to its longest.
    """

    def __init__(self, directory: str | Path, optimizer: OptimizerConfig, micro_batch_tokens: int):
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa")
        self.model.train()
        self._clip = optimizer.clip_grad_norm
        self._budget = micro_batch_tokens
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        )

    def step(self, sequences: Sequence[TrainSample], denominator: float) -> tuple[float, float]:
        """Take an optimizer step on sum(-advantage x log-prob) / denominator; returns loss and gradient norm."""
        lengths = [len(sequence) for sequence in sequences]
        (micros,) = plan_micro_batches(lengths, ranks=1, budget=self._budget, shape=PackingShape(packed=False))
        total = 0.0
        for indices in micros:
            loss = self._loss([sequences[index] for index in indices]) / denominator
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return total, norm.item()

    def _loss(self, rows: Sequence[TrainSample]) -> torch.Tensor:
        length = max(map(len, rows))
        tokens = [row.token_ids.tolist() for row in rows]
        ids = torch.tensor([row + [0] * (length - len(row)) for row in tokens])
        seen = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in tokens])
        micro = pad(rows, length)
        logits = self.model(input_ids=ids, attention_mask=None if seen.all() else seen, use_cache=False).logits
        log_probs = torch.log_softmax(logits, dim=-1).gather(2, micro.targets[:, :, None])[:, :, 0]
        return weighted_loss(log_probs, log_probs, micro)[0]


def weighted_loss(
    log_probs: torch.Tensor, entropy: torch.Tensor, micro: MicroBatch
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the policy gradient's plainest loss, sum of -advantage x log-prob; `entropy` is not used."""
    loss = -(log_probs * micro.advantages * micro.mask).sum()
    return loss, {"loss": loss.detach()}
