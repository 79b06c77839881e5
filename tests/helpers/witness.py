"""Random sequences, a loss, and what transformers with autograd makes of them: the independent witness."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers

from exprl_megatron.algorithms.batch import MicroBatch, TrainSample


def sequences(vocabulary: int, count: int = 7, seed: int = 5) -> list[TrainSample]:
    """Return prompts of 2 to 9 and responses of 3 to 20 random tokens, with advantages.

    No token is 0: it is the tiny models' padding token, and transformers gives its embedding no gradient.
    """
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return tuple(torch.randint(1, vocabulary, (length,), generator=generator).tolist())

    made = []
    for _ in range(count):
        prompt, response = ids(2, 9), ids(3, 20)
        advantages = tuple(torch.randn(len(response), generator=generator).tolist())
        made.append(TrainSample(prompt, response, advantages=advantages))
    return made


def equal_sequences(vocabulary: int) -> list[TrainSample]:
    """Return eight sequences of 16 random tokens, which no layout has to pad."""
    ids = torch.randint(1, vocabulary, (8, 16), generator=torch.Generator().manual_seed(9)).tolist()
    return [TrainSample(tuple(row[:4]), tuple(row[4:])) for row in ids]


def with_experts(batch: list[TrainSample], layers: int, experts: int, top_k: int, seed: int = 7) -> list[TrainSample]:
    """Return the same with experts for each token and layer that no router chose."""
    draw = np.random.default_rng(seed)
    shapes = [(len(sample) - 1, layers, experts) for sample in batch]
    drawn = [draw.permuted(np.broadcast_to(np.arange(experts, dtype=np.uint8), shape), axis=2) for shape in shapes]
    return [replace(sample, routed_experts=rows[..., :top_k]) for sample, rows in zip(batch, drawn, strict=True)]


def tokens(batch: list[TrainSample]) -> int:
    """Return the number of response tokens."""
    return sum(sequence.response_tokens for sequence in batch)


def listed(log_probs) -> list[list[float]]:
    """Return what Policy.log_probs gives, as lists that can be compared."""
    return [row.tolist() for row in log_probs]


def loss_function(log_probs: torch.Tensor, entropy: torch.Tensor, micro: MicroBatch):
    """Weighted log-likelihood and a term in the entropy, so that both gradients count."""
    loss = -((micro.advantages * log_probs + 0.1 * entropy) * micro.mask).sum()
    largest = (log_probs.detach() * micro.mask).abs().max()
    return loss, {"loss": loss.detach(), "entropy": (entropy.detach() * micro.mask).sum(), "gap/max": largest}


def expectation(directory: Path, batch: list[TrainSample], temperature: float) -> dict:
    """`log_probs` of the response tokens, sums of loss and entropy, and the norm of the gradient of loss / tokens.

    Of sequences with `routed_experts` under these experts, weighted as the model's own router weights them.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    log_probs, losses, entropies = [], [], []
    for sequence in batch:
        ids = torch.tensor([sequence.token_ids.tolist()])
        hooks = [] if sequence.routed_experts is None else _route(model, sequence.routed_experts)
        logits = model(ids).logits[0].float() / temperature
        for hook in hooks:
            hook.remove()
        table = logits[len(sequence.prompt_ids) - 1 : -1].log_softmax(-1)
        chosen = table.gather(1, torch.tensor(sequence.response_ids.tolist())[:, None])[:, 0]
        entropy = -(table.exp() * table).sum(-1)
        log_probs.append(chosen.tolist())
        entropies.append(entropy.sum())
        losses.append(-(torch.tensor(sequence.advantages) * chosen + 0.1 * entropy).sum())
    (sum(losses) / tokens(batch)).backward()
    squares = sum(float(p.grad.double().square().sum()) for p in model.parameters())
    return {
        "log_probs": log_probs,
        "loss": float(sum(losses).detach()),
        "entropy": float(sum(entropies).detach()),
        "gap/max": max(abs(value) for row in log_probs for value in row),
        "grad_norm": squares**0.5,
    }


def _route(model: torch.nn.Module, experts: np.ndarray) -> list:
    """Let each layer's router choose `experts` [tokens - 1, layers, top_k]; the last token's are any."""
    rows = torch.tensor(experts).long()
    rows = torch.cat([rows, rows[-1:]])

    def routed(gate, chosen: torch.Tensor):
        def hook(module, inputs, output):
            logits = output[0]
            sigmoid = hasattr(gate, "e_score_correction_bias")
            scores = (logits.float().sigmoid() if sigmoid else logits.float().softmax(-1)).gather(1, chosen)
            if getattr(gate, "norm_topk_prob", True):
                scores = scores / scores.sum(-1, keepdim=True)
            return logits, scores * getattr(gate, "routed_scaling_factor", 1.0), chosen

        return gate.register_forward_hook(hook)

    gates = [getattr(layer.mlp, "gate", None) for layer in model.model.layers]
    return [routed(gate, rows[:, number]) for number, gate in enumerate(gates) if gate is not None]


def largest_difference(ours: list[list[float]], theirs: list[list[float]]) -> float:
    """Of two ragged tables of the same shape."""
    assert [len(row) for row in ours] == [len(row) for row in theirs]
    pairs = [pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a, b, strict=True)]
    return max(abs(a - b) for a, b in pairs)


def gradient_norm_of_balance(directory: Path, vocabulary: int, weight: float) -> float:
    """Of weight x the Switch Transformer's load-balancing loss (arXiv 2101.03961, eq. 4), summed over layers.

    With E experts, k of them to a token, T tokens: loss = E sum_i f_i P_i, f_i = (tokens sent to i) / (k T), P_i
    the mean of the router's probability for i; here the mean over equal_sequences of the loss of each.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    losses = []

    def read_router(gate, inputs) -> None:
        logits = inputs[0].reshape(-1, gate.weight.shape[1]) @ gate.weight.T
        experts, chosen = len(gate.weight), model.config.num_experts_per_tok
        sent = torch.zeros_like(logits).scatter(1, logits.topk(chosen).indices, 1.0).mean(0) / chosen
        losses.append(experts * (sent * logits.softmax(-1).mean(0)).sum())

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_pre_hook(read_router)
    batch = equal_sequences(vocabulary)
    for sequence in batch:
        model(torch.tensor([sequence.token_ids.tolist()]))
    (weight * sum(losses) / len(batch)).backward()
    squares = sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)
    return squares**0.5
