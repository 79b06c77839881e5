"""Conversion streams: memory grows with neither the model nor the number of its files."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import save_file

from exprl_megatron.models.architecture import read_architecture
from exprl_megatron.models.name_map import hf_shapes

pytestmark = pytest.mark.slow

SHARD = 50_000_000
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "max_position_embeddings": 2048,
    "num_attention_heads": 8,
    "num_hidden_layers": 12,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "vocab_size": 8000,
}


@pytest.fixture
def out() -> Iterator[Path]:
    """For more than a gigabyte, which is not to stay."""
    with TemporaryDirectory() as directory:
        yield Path(directory)


@pytest.fixture
def model(out) -> Path:
    """About 320 MB in shards of 50 MB."""
    directory = out / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    shards, filled = [{}], 0
    for name, shape in hf_shapes(read_architecture(directory)).items():
        tensor = torch.randn(shape, dtype=torch.bfloat16)
        if filled + tensor.nbytes > SHARD:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    weight_map = {}
    for number, shard in enumerate(shards):
        weight_map |= dict.fromkeys(shard, f"model-{number}.safetensors")
        save_file(shard, directory / f"model-{number}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert len(shards) > 5
    return directory


def test_memory_grows_by_at_most_two_shards(model, out):
    worker = Path(__file__).with_name("memory_worker.py")
    command = [sys.executable, "-W", "ignore", str(worker), str(model), str(out), str(SHARD)]
    grown = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    print(grown)
    assert set(grown) == {"to-megatron", "to-hf", "to-hf fp8", "verify"}
    assert max(grown.values()) <= 2 * SHARD
