"""tools/bench_reshard.py: its model, its floor, its table."""

import subprocess
import sys

import bench_reshard
import pytest
import torch
from benchmarks.broadcast_floor import Floor
from benchmarks.sync_runs import Measured, to_dict, write_model
from safetensors.torch import load_file

from exprl_megatron.config.policy import Layout
from exprl_megatron.models.architecture import read_architecture
from exprl_megatron.models.name_map import hf_shapes
from exprl_megatron.utils.ports import free_ports


@pytest.mark.parametrize(
    ("text", "layout"), [("1x1", Layout()), ("2x4", Layout(tp=2, pp=4)), ("2x1x2", Layout(tp=2, dp=2))]
)
def test_layouts_are_read(text, layout):
    assert bench_reshard.parsed(text) == layout


def test_the_model_has_about_the_size_asked_for_and_all_its_tensors(tmp_path):
    directory = write_model(tmp_path / "model", 2e8)
    tensors = load_file(directory / "model.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == hf_shapes(read_architecture(directory))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert 1.2e8 < sum(tensor.nbytes for tensor in tensors.values()) <= 2e8


def test_a_share_is_the_floor_s_seconds_over_the_sync_s():
    parts = {"gather": 0.1, "quantize": 0.0, "send": 1.0, "load": 0.5, "check": 0.25}
    record = to_dict(Measured("TP1 x PP1 x DP1", 2, "broadcast", 64.0, 1.0, 1.2, 1.6, parts))
    assert record["share"] == pytest.approx(0.75)
    assert bench_reshard.line(record).split()[-8:] == [
        "1.00",
        "1.200",
        "1.600",
        "0.75",
        "0.100",
        "1.000",
        "0.500",
        "0.250",
    ]


@pytest.mark.slow
def test_the_floor_s_receivers_end_with_it():
    (port,) = free_ports(1)
    command = [sys.executable, bench_reshard.__file__, "--receiver", str(port)]
    commands = [[*command, str(rank), "2"] for rank in (1, 2)]
    receivers = [subprocess.Popen(command) for command in commands]
    floor = Floor(port, 2)
    assert floor.seconds([1000, 50_000]) > 0 and floor.seconds([7]) > 0
    floor.close()
    assert [receiver.wait(60) for receiver in receivers] == [0, 0]
