"""Block-quantized weights against those who read them: SGLang's dequantizer and config, transformers' loader."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from exprl_megatron.conversion.to_hf import convert_to_huggingface
from exprl_megatron.conversion.to_megatron import convert_to_megatron
from exprl_megatron.conversion.verify import verify_weights
from exprl_megatron.conversion.weights import open_weights
from exprl_megatron.errors import UserError
from exprl_megatron.models.fp8_blocks import dequantize, quantize
from exprl_megatron.serving.server_command import server_environment

SHAPES = [(128, 128), (256, 384), (130, 200), (1, 1)]
FAMILIES = ["llama", "qwen2", "qwen3", "qwen3-moe", "mixtral", "mistral", "seed-oss", "glm4-moe", "olmo3"]
WHOLE_BLOCKS = {
    "qwen3-moe": {"moe_intermediate_size": 128},
    "glm4-moe": {"moe_intermediate_size": 128},
    "seed-oss": {"head_dim": 64},
}
"""Sizes without which blocks would lie across seams."""
PLAIN = ("norm.weight", "bias", "embed_tokens.weight", "lm_head.weight", "gate.weight")
"""Ends of the names of what is not quantized; `gate` is a router."""


@pytest.fixture(scope="module")
def quantized(tiny_model, tmp_path_factory):
    """`quantized(family)`: a tiny model of it, and that model written in FP8."""
    written: dict[str, tuple[Path, Path]] = {}

    def get(family: str) -> tuple[Path, Path]:
        if family not in written:
            out = tmp_path_factory.mktemp(family)
            model = tiny_model(family, hidden=256, **WHOLE_BLOCKS.get(family, {}))
            convert_to_megatron(model, out / "megatron")
            convert_to_huggingface(open_weights(out / "megatron"), out / "fp8", "fp8", file_bytes=500_000)
            written[family] = model, out / "fp8"
        return written[family]

    return get


@pytest.fixture(scope="module")
def of_sglang(quantized, tmp_path_factory) -> dict:
    """What SGLang says of `matrix` in all SHAPES and of a config; in a process with the servers' CPU backend."""
    out = tmp_path_factory.mktemp("sglang")
    config = json.loads((quantized("qwen3-moe")[1] / "config.json").read_text())["quantization_config"]
    asked = {"matrices": [quantize(matrix(*shape)) for shape in SHAPES], "config": json.dumps(config)}
    torch.save(asked, out / "given.pt")
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("sglang_worker.py"))]
    command += [str(out / "given.pt"), str(out / "said.pt")]
    environment = server_environment(os.environ, cuda=False)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out / "said.pt")


def matrix(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_sglang_gives_back_what_was_quantized_to_a_16th_of_each_number(of_sglang, shape):
    weight, given_back = matrix(*shape), of_sglang["weights"][SHAPES.index(shape)]
    values, scale = quantize(weight)
    assert values.dtype == torch.float8_e4m3fn
    assert scale.dtype == torch.float32
    assert scale.shape == tuple(-(-size // 128) for size in shape)
    # e4m3 has three bits after the point: half a step is 1/16 of a normal number; below 2^-6 the steps are even.
    smallest = 2.0**-10 * scale.max()
    assert ((given_back - weight).abs() <= weight.abs() / 16 + smallest).all()
    assert torch.equal(dequantize(values, scale), given_back)


def test_each_block_uses_the_whole_range_and_its_scale_alone():
    weight = matrix(256, 256)
    weight[:128, :128] *= 1e-6
    weight[128:, 128:] = 0
    values, scale = quantize(weight)
    blocks = values.float().abs().view(2, 128, 2, 128).amax(dim=(1, 3))
    assert torch.equal(blocks, torch.tensor([[448.0, 448.0], [448.0, 0.0]]))
    largest = weight.abs().view(2, 128, 2, 128).amax(dim=(1, 3))
    assert torch.allclose(scale, torch.where(largest > 0, largest / 448, 1.0), rtol=1e-6)
    assert torch.equal(quantize(weight.bfloat16())[0].float(), quantize(weight.bfloat16().float())[0].float())


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_are_quantized_and_nothing_else(quantized, tiny_model, tensors, family):
    model, fp8 = quantized(family)
    original, written = tensors(model), tensors(fp8)
    for name, tensor in original.items():
        if name.endswith(PLAIN):
            assert torch.equal(written.pop(name), tensor)
        else:
            values, scale = quantize(tensor)
            assert torch.equal(written.pop(name).view(torch.uint8), values.view(torch.uint8))
            assert torch.equal(written.pop(name + "_scale_inv"), scale)
    assert not written
    assert verify_weights(model, fp8).equal


def test_verify_tells_a_quantized_model_from_another_ones(quantized, tiny_model):
    assert not verify_weights(tiny_model("qwen3", hidden=256, seed=1), quantized("qwen3")[1]).equal


def test_verify_refuses_a_quantized_model_whose_config_does_not_say_so(quantized, tmp_path):
    model, fp8 = quantized("qwen3")
    copy = Path(shutil.copytree(fp8, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    del config["quantization_config"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"is not that of .* quantized \(quantization_config\)"):
        verify_weights(model, copy)


def test_a_model_directory_is_quantized_without_megatrons_files(quantized, tmp_path, tensors):
    model, fp8 = quantized("mixtral")
    convert_to_huggingface(open_weights(model), tmp_path / "fp8", "fp8")
    direct, other = tensors(tmp_path / "fp8"), tensors(fp8)
    assert direct.keys() == other.keys()
    assert all(torch.equal(direct[name].view(torch.uint8), other[name].view(torch.uint8)) for name in other)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_every_matrix_as_it_was_quantized(quantized, family):
    model, fp8 = quantized(family)
    dequantized = FineGrainedFP8Config(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(fp8, quantization_config=dequantized, dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found, matrices = theirs.state_dict(), 0
    for name, tensor in original.state_dict().items():
        if not name.endswith(PLAIN):
            # transformers keeps all experts of a layer in one tensor, gate above up: seams lie between blocks.
            parts = tensor.reshape(-1, *tensor.shape[-2:])
            tensor = torch.stack([dequantize(*quantize(part)) for part in parts]).view(tensor.shape)
            matrices += len(parts)
        assert torch.equal(found.pop(name), tensor)
    assert not found
    assert matrices >= 2 * 6


@pytest.mark.slow
def test_sglang_understands_the_config(of_sglang):
    understood = of_sglang["config"]
    assert understood["serialised"]
    assert (understood["activations"], understood["block"]) == ("dynamic", [128, 128])
    assert {"lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"} <= set(understood["ignored"])


def test_blocks_across_the_seams_of_joined_matrices_are_refused(tiny_model, tmp_path):
    convert_to_megatron(tiny_model("qwen3"), tmp_path / "megatron")
    with pytest.raises(UserError, match=r"q_proj.weight .* has 64 rows, not a multiple of 128"):
        convert_to_huggingface(open_weights(tmp_path / "megatron"), tmp_path / "fp8", "fp8")
    assert not list(tmp_path.glob("fp8*"))
