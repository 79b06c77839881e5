import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from exprl_megatron.policy import log_probs as module
from exprl_megatron.policy.log_probs import response_log_probs

VOCABULARY = 11


@pytest.fixture(autouse=True)
def narrow_tiles(monkeypatch):
    """The vocabulary takes more than one tile: 12 rows are 5, 5 and 2."""
    monkeypatch.setattr(module, "TILE_ROWS", 5)


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden [5, 2, 6], weight [12, 6] (a row of padding), targets and mask [2, 5] with 7 tokens wanted."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 2, 6, generator=generator, requires_grad=True)
    weight = torch.randn(12, 6, generator=generator, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (2, 5), generator=generator)
    mask = torch.tensor([[0.0, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return hidden, weight, targets, mask


def ours(hidden, weight, targets, mask, chunk=3, temperature=0.7):
    return response_log_probs(
        hidden,
        weight,
        targets,
        (mask.T.flatten() > 0).nonzero()[:, 0],
        torch.arange(mask.numel()).view_as(mask).T.flatten()[mask.T.flatten() > 0],
        temperature=temperature,
        vocabulary=VOCABULARY,
        chunk=chunk,
        sequence_parallel=False,
    )


def plain(hidden, weight, targets, mask, temperature=0.7):
    """The same from the undivided table of logits."""
    table = (hidden.transpose(0, 1) @ weight[:VOCABULARY].T / temperature).log_softmax(-1)
    chosen = table.gather(2, targets[..., None])[..., 0]
    return torch.stack([chosen * mask, -(table.exp() * table).sum(-1) * mask])


def test_values_and_gradients_are_those_of_the_undivided_table(world):
    hidden, weight, targets, mask = tensors()
    outer = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(1))
    expected = plain(hidden, weight, targets, mask)
    wanted = torch.autograd.grad((expected * outer).sum(), (hidden, weight))
    for chunk in (1, 3, 100, None):
        result = ours(hidden, weight, targets, mask, chunk)
        assert torch.allclose(result, expected, atol=1e-6)
        found = torch.autograd.grad((result * outer).sum(), (hidden, weight))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, wanted, strict=True))


def test_entropy_of_equal_logits_is_the_logarithm_of_the_vocabulary(world):
    hidden, weight, targets, mask = tensors()
    result = ours(torch.zeros_like(hidden), weight, targets, mask)
    assert torch.allclose(result[1][mask > 0], torch.tensor(float(VOCABULARY)).log())
    assert torch.allclose(result[0][mask > 0], -torch.tensor(float(VOCABULARY)).log())


def test_extreme_logits_stay_finite(world):
    hidden, weight, targets, mask = tensors()
    result = ours(hidden * 1e4, weight, targets, mask)
    result.sum().backward()
    assert all(torch.isfinite(tensor).all() for tensor in (result, hidden.grad, weight.grad))


def test_no_more_than_a_chunk_of_logits_exists_at_a_time(world, monkeypatch):
    counted, original = [], module._Tiles.logits

    def counting(tiles, hidden, rows):
        counted.append((len(hidden), rows.stop - rows.start))
        return original(tiles, hidden, rows)

    monkeypatch.setattr(module._Tiles, "logits", counting)
    hidden, weight, targets, mask = tensors()
    ours(hidden, weight, targets, mask, chunk=3).sum().backward()
    forward = [(tokens, rows) for tokens in (3, 3, 1) for rows in (5, 5, 2)]
    assert counted == forward + [(tokens, rows) for rows in (5, 5, 2) for tokens in (3, 3, 1)]


def test_tiles_are_bounded_in_bytes(monkeypatch):
    monkeypatch.setattr(module, "TILE_BYTES", 1000)
    for dtype, copies in ((torch.float32, 12), (torch.bfloat16, 10)):
        parts = module._Tiles(torch.zeros(12, 6, dtype=dtype), 1.0, 11, None).parts(100)
        assert max(part.stop - part.start for part in parts) == 1000 // (5 * copies)
        assert (parts[0].start, parts[-1].stop) == (0, 100)


def test_bf16_gradients_are_those_of_fp32_rounded(world):
    hidden, weight, targets, mask = tensors()
    hidden, weight = (tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight))
    wide = [tensor.detach().float().requires_grad_() for tensor in (hidden, weight)]
    ours(hidden, weight, targets, mask).sum().backward()
    plain(*wide, targets, mask).sum().backward()
    for found, expected in zip((hidden, weight), wide, strict=True):
        assert found.grad.dtype == torch.bfloat16
        assert torch.allclose(found.grad.float(), expected.grad, atol=0.02 * float(expected.grad.abs().max()))


def test_a_micro_batch_without_response_tokens_has_zero_gradients(world):
    hidden, weight, targets, mask = tensors()
    result = ours(hidden, weight, targets, torch.zeros_like(mask))
    result.sum().backward()
    assert result.abs().sum() == hidden.grad.abs().sum() == weight.grad.abs().sum() == 0


@pytest.mark.slow
def test_the_logits_of_16k_tokens_and_152k_rows_take_less_than_1_gb_forward_and_backward():
    """One fp32 copy of them would be 10 GB. The hidden size is small: inputs and gradients are not what is measured."""
    script = Path(__file__).with_name("log_probs_peak.py")
    command = [sys.executable, str(script), "16384", "152064", "16", "float32"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert json.loads(done.stdout.splitlines()[-1])["extra_bytes"] < 2**30
