"""Run by test_log_probs.py: peak memory of log-probs and entropy, forward and backward, as JSON on the last line."""

import json
import sys
import time
from pathlib import Path

import torch

from exprl_megatron.config.policy import Layout
from exprl_megatron.policy.log_probs import response_log_probs
from exprl_megatron.policy.world import enter_world, leave_world


def resident(field: str) -> int:
    """Bytes that /proc says this process holds (VmRSS) or held at most (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def run(tokens: int, vocabulary: int, hidden: torch.Tensor, weight: torch.Tensor) -> None:
    targets = torch.arange(tokens)[None] % vocabulary
    places = torch.arange(tokens)
    values = response_log_probs(
        hidden[:tokens],
        weight,
        targets,
        places,
        places,
        temperature=1.0,
        vocabulary=vocabulary,
        chunk=None,
        sequence_parallel=False,
    )
    values.sum().backward()


def main(tokens: int, vocabulary: int, width: int, dtype: str) -> None:
    torch.set_num_threads(1)
    enter_world(Layout())
    kind = getattr(torch, dtype)
    hidden = torch.randn(tokens, 1, width).to(kind).requires_grad_()
    weight = (0.05 * torch.randn(vocabulary, width)).to(kind).requires_grad_()
    # What libraries allocate once, at their first use.
    run(16, vocabulary, hidden, weight)
    hidden.grad = weight.grad = None
    Path("/proc/self/clear_refs").write_text("5")
    before, start = resident("VmRSS"), time.monotonic()
    run(tokens, vocabulary, hidden, weight)
    print(json.dumps({"extra_bytes": resident("VmHWM") - before, "seconds": time.monotonic() - start}))
    leave_world()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
