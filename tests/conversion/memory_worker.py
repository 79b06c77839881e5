"""Run by test_streaming.py: converts there and back, verifies, and tells by how many bytes memory grew at most."""

import json
import sys
from pathlib import Path

import torch

from exprl_megatron.conversion.to_hf import convert_to_huggingface
from exprl_megatron.conversion.to_megatron import convert_to_megatron
from exprl_megatron.conversion.verify import verify_weights
from exprl_megatron.conversion.weights import open_weights


def status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak(work) -> int:
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    work()
    return status("VmHWM") - before


def main() -> None:
    model, out, file_bytes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    megatron = out / "megatron"
    work = {
        "to-megatron": lambda: convert_to_megatron(model, megatron, file_bytes=file_bytes),
        "to-hf": lambda: convert_to_huggingface(open_weights(megatron), out / "hf", None, file_bytes),
        "to-hf fp8": lambda: convert_to_huggingface(open_weights(megatron), out / "fp8", "fp8", file_bytes),
        "verify": lambda: verify_weights(model, megatron, logits="no"),
    }
    found = {name: peak(run) for name, run in work.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
