"""Run by test_memory.py: converts there and back and tells by how many bytes memory grew at most."""

import json
import sys
from pathlib import Path

import torch

from exprl_megatron.conversion.to_hf import convert_to_huggingface
from exprl_megatron.conversion.to_megatron import convert_to_megatron
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
    found = {"to-megatron": peak(lambda: convert_to_megatron(model, out / "megatron", file_bytes=file_bytes))}
    weights = open_weights(out / "megatron")
    for form in (None, "fp8"):
        found[f"to-hf {form}"] = peak(
            lambda form=form: convert_to_huggingface(weights, out / str(form), form, file_bytes)
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
