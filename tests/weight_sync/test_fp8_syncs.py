"""Weights for FP8 servers are quantized while they are gathered: as if the whole tensor had been, from every layout."""

from pathlib import Path

import pytest
import torch
from helpers.ranks import run_ranks
from safetensors.torch import load_file

from exprl_megatron.errors import UserError
from exprl_megatron.models.fp8_blocks import SCALE, dequantize, is_quantized, quantize
from exprl_megatron.serving.checksums import rank_checksums
from exprl_megatron.weight_sync.weight_check import to_served_dtypes
from exprl_megatron.weight_sync.weight_exporter import quantize_into

LAYOUTS = ("TP1", "TP2", "TP4", "TP2xPP2")


@pytest.fixture(scope="module")
def model(tiny_model) -> Path:
    # Of four ranks each has 64 rows of a projection and 96 of the MLP: blocks of 128 lie across ranks.
    return tiny_model("qwen3", layers=2, hidden=256, kv_heads=4)


@pytest.fixture(scope="module")
def sent(model, tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    """What left each layout."""
    out = tmp_path_factory.mktemp("fp8")
    run_ranks(Path(__file__).with_name("fp8_worker.py"), 4, out, model=model)
    return {
        layout: {name: tensor for file in (out / layout).iterdir() for name, tensor in load_file(file).items()}
        for layout in LAYOUTS
    }


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_are_those_of_the_whole_tensor_bit_for_bit(model, sent, layout):
    whole = {name: tensor.bfloat16() for name, tensor in load_file(model / "model.safetensors").items()}
    expected = {}
    for name, tensor in whole.items():
        if is_quantized(name, tuple(tensor.shape)):
            expected[name], expected[name + SCALE] = quantize(tensor)
        else:
            expected[name] = tensor
    assert sum(tensor.dtype == torch.float8_e4m3fn for tensor in expected.values()) == 2 * 7
    assert sent[layout].keys() == expected.keys()
    for name, tensor in expected.items():
        assert sent[layout][name].dtype == tensor.dtype
        assert torch.equal(sent[layout][name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("shape", [(300, 200), (128, 128), (1, 5), (257, 2**16)])
def test_rows_at_a_time_give_the_same_as_all_at_once(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    values = torch.empty(shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty([-(-size // 128) for size in shape])
    quantize_into(weight, values, scales)
    expected = quantize(weight)
    assert torch.equal(values.view(torch.uint8), expected[0].view(torch.uint8)) and torch.equal(scales, expected[1])


def test_a_server_reports_the_numbers_that_blocks_stand_for():
    generator = torch.Generator().manual_seed(0)
    parts = {
        f"model.layers.0.mlp.{part}_proj.weight": torch.randn(256, 128, generator=generator) for part in ("gate", "up")
    }
    bucket, plain = [("model.norm.weight", torch.ones(4))], [("model.norm.weight", torch.ones(4))]
    for name, tensor in parts.items():
        values, scale = quantize(tensor)
        bucket += [(name + SCALE, scale), (name, values)]
        plain.append((name, dequantize(values, scale).bfloat16()))
    expected = rank_checksums(plain, tp=2, kv_heads=2, tied=False)
    assert rank_checksums(to_served_dtypes(bucket), tp=2, kv_heads=2, tied=False) == expected


def test_a_model_whose_blocks_would_cross_seams_is_refused(tiny_model):
    from exprl_megatron.config.policy import Layout, PolicyConfig
    from exprl_megatron.policy.policy import Policy
    from exprl_megatron.policy.world import enter_world, leave_world
    from exprl_megatron.weight_sync.weight_exporter import WeightExporter

    world = enter_world(Layout())
    policy = Policy(PolicyConfig(model=str(tiny_model("qwen3"))), seed=0)
    with pytest.raises(UserError, match="not a multiple of 128"):
        WeightExporter(policy.chunks, policy.architecture, world, 2**20, source_ranks=None, fp8=True)
    leave_world()
