"""Bytes and seconds that `journal.trainer_log_probs` takes: `python tools/bench_trainer_log_probs.py`.

Of one data-parallel rank: what its loss keeps while it learns, and what its thread writes during the next step.
"""

import argparse
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from exprl_megatron.algorithms.batch import TrainSample, pad
from exprl_megatron.training.trainer_log_probs import TrainerLogProbs


def main() -> None:
    """Print bytes and nanoseconds for each token."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=int, default=128, help="2,048 traces on 16 data-parallel ranks are 128 each")
    parser.add_argument("--tokens", type=int, default=6000)
    arguments = parser.parse_args()
    world = SimpleNamespace(layout=SimpleNamespace(dp=1), dp_rank=0, tp_rank=0, cp_rank=0, last_stage=True)
    draw = np.random.default_rng(0)
    samples = [
        TrainSample((1,), np.ones(arguments.tokens), place=(number // 16, number % 16))
        for number in range(arguments.traces)
    ]
    # The sampler's distribution of surprise: most tokens are nearly certain.
    values = [torch.tensor(-draw.gamma(0.25, 1.6, (1, arguments.tokens + 1)), dtype=torch.float32) for _ in samples]
    micros = [pad([sample], arguments.tokens + 1) for sample in samples]
    count = arguments.traces * arguments.tokens
    with tempfile.TemporaryDirectory() as directory:
        kept = TrainerLogProbs(Path(directory), world, is_rank0=True)
        objective = kept.recorded(lambda *_: (torch.zeros(()), {}))
        started = time.process_time()
        for log_probs, micro in zip(values, micros, strict=True):
            objective(log_probs, log_probs, micro)
        keeping = time.process_time() - started
        kept.write("other", 1)
        kept.wait()
        for log_probs, micro in zip(values, micros, strict=True):
            objective(log_probs, log_probs, micro)
        started = time.process_time()
        kept.write("stage", 1)
        kept.wait()
        writing = time.process_time() - started
        size = sum(path.stat().st_size for path in Path(directory, "stage").rglob("*.parquet"))
    print(f"{count} tokens: {size / count:.2f} bytes a token on disk, {4e-6 * count:.1f} MB held")
    print(f"CPU ns a token: {1e9 * keeping / count:.2f} while learning, {1e9 * writing / count:.2f} in the thread")


if __name__ == "__main__":
    main()
