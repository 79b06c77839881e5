"""tools/bench_fp8.py without a GPU: it runs real layers, and says what was measured and what was not."""

import json
from dataclasses import replace

import bench_fp8
import pytest
import torch
from benchmarks import layers
from benchmarks.layer_report import NVIDIA_SPEEDUP, known_gpu, measured_lines, predicted, throughput
from benchmarks.layers import LayerFigures, Work, narrowed, speedups
from benchmarks.peak_memory import extra_bytes

from exprl_megatron.planning.hardware import GPUS
from exprl_megatron.planning.targets import find_architecture

LLAMA, _ = find_architecture("llama-3.1-70b")
WORK = Work(replace(LLAMA, layers=4), shallow=2, sequence_length=8192, sequences=1)


def test_a_run_on_a_cpu_says_that_no_fp8_kernel_ran(tmp_path, capsys, monkeypatch):
    timed = layers._timed

    def by_depth(chunk, step, depth=None):
        """A loaded machine may take longer for one layer than for two, and then nothing is extrapolated."""
        timed(chunk, step, depth)
        return 0.1 * (1 + (depth or 2))

    monkeypatch.setattr(layers, "_timed", by_depth)
    bench_fp8.main(f"--layers 2 --shrink 128 --seq 32 --rounds 1 --json {tmp_path / 'f.json'}".split())
    told = capsys.readouterr().out
    assert "no FP8 kernel ran" in told
    assert "fp8-blockwise over bf16" in told and f"{NVIDIA_SPEEDUP:.2f}x" in told
    assert all("PREDICTION" in line for line in told.splitlines() if "fp8" in line.lower() and "kernel" not in line)
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["fp8_kernels"] is False
    assert [(m["precision"], m["layers"]) for m in found["measured"]] == [
        ("bf16", 2), ("bf16", 80), ("fp32", 2), ("fp32", 80)
    ]  # fmt: skip
    bf16, fp32 = (r["peak_bytes"] for r in found["rounds"])
    # Weights and gradients at least, of two layers of 76 thousand parameters and 2 x 64 thousand for the vocabulary.
    assert 2 * 2 * 280e3 < bf16 < fp32
    assert {p["precision"] for p in found["predicted"]} == {"bf16", "fp8-tensorwise", "fp8-blockwise"}


def test_one_layer_is_refused_as_its_time_comes_from_two_depths():
    with pytest.raises(SystemExit, match="--layers is 1; give 2 or more"):
        bench_fp8.main(["--layers", "1"])


def test_what_is_not_a_precision_is_refused_by_name():
    with pytest.raises(SystemExit, match="--precision has fp9; choose from fp32, bf16"):
        bench_fp8.main(["--precision", "bf16,fp9"])


def test_peak_memory_is_of_tensors_that_live_at_the_same_time():
    def call():
        first = torch.ones(256, 1024)
        second = first * 2
        del first
        return second + 1

    assert extra_bytes(call) == pytest.approx(2 * 2**20, abs=1000)


def test_depths_are_extrapolated_along_a_line():
    # 1 s for the output layer and 3 s for each layer, half as long in FP8.
    slow = LayerFigures("bf16", deep_s=(13.0, 13.0), shallow_s=(7.0, 7.0), peak_bytes=0)
    fast = LayerFigures("fp8-tensorwise", deep_s=(7.0, 7.0), shallow_s=(4.0, 4.0), peak_bytes=0)
    assert slow.seconds(WORK, 80) == (241.0, 241.0)
    assert speedups(slow, fast, WORK, 80) == pytest.approx((241 / 121,) * 3)


def test_noise_that_hides_the_depth_is_said_and_not_extrapolated():
    quiet = LayerFigures("bf16", deep_s=(13.0, 13.0), shallow_s=(7.0, 7.0), peak_bytes=0)
    noisy = LayerFigures("fp8-tensorwise", deep_s=(7.0, 3.0), shallow_s=(4.0, 4.0), peak_bytes=0)
    *_, slow, refused, ratio = measured_lines([quiet, noisy], WORK, 80, 1, GPUS["h100"])
    assert "241.0000 s" in slow
    assert "fp8-tensorwise  not extrapolated: in a round 2 layers took as long as 4" in refused
    assert "at 80 layers" not in ratio and "3.10x measured (1.86 to 4.33 by rounds)" in ratio


@pytest.mark.parametrize(
    ("kind", "peak", "name"),
    [("fp8-tensorwise", 1978.9e12, "FP8 1979"), ("bf16", 989.4e12, "BF16 989"), ("fp32", 67e12, "FP32 67")],
)
def test_utilisation_is_of_the_named_peak(kind, peak, name):
    # 6 operations a parameter and token, and causal attention: 6 x 2 x layers x hidden x length / 2.
    parameters = 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672) + 128256 * 8192
    needed = 6 * parameters + 6 * 80 * 8192 * 8192
    figures = LayerFigures(kind, deep_s=(0.5,), shallow_s=(0.25,), peak_bytes=0)
    found = throughput(figures, WORK, 80, tp=2, gpu=GPUS["h100"])
    assert found.tokens_per_s_per_gpu == pytest.approx(8192 / 10 / 2)
    assert found.mfu == pytest.approx(needed * 8192 / 10 / 2 / peak)
    assert found.peak == f"H100 SXM dense {name} TFLOP/s"
    assert throughput(figures, WORK, 80, tp=2, gpu=None).mfu is None


def test_fp8_is_predicted_faster_than_bf16_but_not_twice_as_fast():
    seconds = {k: predicted(LLAMA, k, WORK, 8, GPUS["h100"]).seconds for k in ("bf16", "fp8-tensorwise")}
    assert 1.1 < seconds["bf16"] / seconds["fp8-tensorwise"] < 2


def test_the_gpu_is_known_by_what_torch_calls_it():
    assert known_gpu("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    assert known_gpu("NVIDIA GB200") is GPUS["gb200"]
    assert known_gpu("NVIDIA A100-SXM4-80GB") is None


def test_narrow_layers_keep_the_size_of_a_head():
    narrow = narrowed(LLAMA, 16, tp=2)
    assert (narrow.hidden, narrow.heads, narrow.kv_groups, narrow.head_dim, narrow.ffn) == (512, 4, 2, 128, 1792)
