"""The model of training time: published throughput, and the shape it must have whatever its constants."""

from statistics import median

import pytest
from validate_planner import architecture_of, comparisons, counted_flops, published_rows

from exprl_megatron.config.policy import Layout
from exprl_megatron.config.precision import PrecisionConfig
from exprl_megatron.errors import UserError
from exprl_megatron.models.flops import model_flops
from exprl_megatron.planning.hardware import GPUS, find_gpu
from exprl_megatron.planning.kernels import attention_seconds, gemm_flops_per_s
from exprl_megatron.planning.links import exchange_seconds, ring_bandwidth
from exprl_megatron.planning.trainer_features import TrainerFeatures
from exprl_megatron.planning.training_time import log_prob_time, training_time

MODELS = published_rows()["models"]
LLAMA_70B = architecture_of(MODELS["llama3-70b"])
QWEN_30B_A3B = architecture_of(MODELS["qwen3-30b-a3b"])


def step(architecture=LLAMA_70B, layout=None, kind="bf16", recompute="none", batch=128, length=8192, gpu="h100"):
    return training_time(
        architecture,
        layout or Layout(tp=4, pp=4, vpp=5, cp=2, dp=2, sequence_parallel=True),
        precision=PrecisionConfig(kind=kind),
        recompute=recompute,
        sequence_length=length,
        global_tokens=batch * length,
        micro_batch_tokens=length,
        gpu=GPUS[gpu],
    )


@pytest.fixture(scope="module")
def compared():
    return comparisons()


def errors(compared, which, group=None):
    return [abs(c.error) for c in compared if c.row["set"] == which and group in (None, c.row["group"])]


def test_the_calibration_rows_are_those_three_and_are_met(compared):
    rows = [c for c in compared if c.row["set"] == "calibration"]
    assert [round(c.published) for c in rows] == [1121, 1567, 14451]
    assert max(abs(c.error) for c in rows) < 0.005


def test_the_other_listed_figures_are_met_within_10_percent_median_and_25_worst(compared):
    found = errors(compared, "check")
    assert len(found) >= 15
    assert median(found) <= 0.10
    assert max(found) <= 0.25


def test_figures_that_had_no_part_in_the_model_are_met_too(compared):
    assert median(errors(compared, "held-out")) <= 0.10
    dense = errors(compared, "held-out", "dense, H100")
    assert len(dense) >= 40
    assert median(dense) <= 0.06
    assert max(dense) <= 0.20


def test_blackwell_is_met_though_nothing_of_it_is_calibrated(compared):
    found = errors(compared, "held-out", "dense, Blackwell") + errors(compared, "check", "dense, Blackwell")
    assert len(found) >= 25
    assert median(found) <= 0.10
    assert sum(error > 0.25 for error in found) <= 1


def test_attention_on_a_b200_is_as_fast_as_measured_within_a_training_step():
    """834 TFLOP/s over forward and backward, Llama 3.1 8B at 8,192 tokens: ml-engineering, when-to-upgrade-gpus."""
    gpu = GPUS["b200"]
    seconds = attention_seconds(1e15, 8192, gpu, backward=False) + attention_seconds(2.5e15, 8192, gpu, backward=True)
    assert 3.5e15 / seconds == pytest.approx(834e12, rel=0.05)


def test_long_products_stay_below_the_best_that_was_measured():
    """Maximum achievable matmul TFLOP/s in BF16 and FP8: ml-engineering, compute/accelerator."""
    best = {"h100": (794.5, 1402.6), "b200": (1745.0, 3432.5), "gb200": (1822.0, 3615.6)}
    for name, rates in best.items():
        for kind, rate in zip(("bf16", "fp8-tensorwise"), rates, strict=True):
            assert 0.8 * rate < gemm_flops_per_s(GPUS[name], kind) / 1e12 < rate, (name, kind)


def test_every_published_row_names_its_source():
    published = published_rows()
    assert all(row["source"] in published["sources"] for row in published["training"])


def test_megatrons_count_of_operations_gives_nvidias_utilisation():
    """54.52 % of 989 TFLOP/s at 71,756 tokens/s on 64 GPUs: dgxc-benchmarking, Llama 3.1 70B."""
    assert counted_flops(LLAMA_70B, 8192) * 71756 / 64 / 989e12 == pytest.approx(0.5452, abs=0.003)


def test_model_operations_are_six_per_parameter_and_token_plus_attention():
    parameters = 80 * (8192 * (8192 + 2048) + 8192 * 8192 + 3 * 8192 * 28672) + 8192 * 128256
    attention = 80 * 3 * 2 * 2 * 8192 * 8192 / 2
    assert model_flops(LLAMA_70B, 8192) == pytest.approx(6 * parameters + attention)


def test_parts_add_up_and_utilisation_names_its_peak():
    time = step(kind="fp8-delayed")
    assert time.total_s == pytest.approx(time.tokens / time.tokens_per_s_per_gpu / time.gpus)
    assert "FP8 1979" in time.peak_name
    assert 0 < time.mfu < 1


def test_fp32_runs_without_tensor_cores():
    """67 TFLOP/s against 989: most of that factor shows."""
    assert 8 < step(kind="fp32").total_s / step().total_s < 15
    assert "FP32 67" in step(kind="fp32").peak_name


def test_fp8_gains_between_1_2_and_1_6():
    """NVIDIA's performance guide says 1.2 to 1.5; its own 70B rows give 1.40."""
    assert 1.2 < step().total_s / step(kind="fp8-delayed").total_s < 1.6


def test_full_recomputation_costs_about_a_third_more_computation():
    plain, again = step(), step(recompute="full")
    assert 0.25 < again.recompute_s / (plain.gemm_s + plain.attention_s + plain.memory_bound_s) < 0.45
    assert again.total_s > step(recompute="selective").total_s > plain.total_s


def test_virtual_stages_shrink_the_bubble_in_proportion():
    bubbles = [
        step(layout=Layout(tp=8, pp=8, vpp=vpp, dp=1, sequence_parallel=True), batch=16).pp_s for vpp in (2, 5, 10)
    ]
    assert bubbles[0] > bubbles[1] > bubbles[2]
    assert bubbles[0] / bubbles[2] == pytest.approx(5, rel=0.35)


def test_a_ring_between_nodes_uses_the_cards_of_its_members_only():
    gpu = GPUS["h100"]
    assert ring_bandwidth(gpu, 8, 1) == ring_bandwidth(gpu, 2, 4) == pytest.approx(360e9)
    assert ring_bandwidth(gpu, 8, 8) == pytest.approx(45e9)
    assert ring_bandwidth(gpu, 8, 4) == pytest.approx(90e9)


def test_tokens_for_experts_cross_nodes_dearly_unless_once_per_node():
    inside = exchange_seconds(32768, 4096, 8, GPUS["h100"], 8, False)
    across = exchange_seconds(32768, 4096, 8, GPUS["h100"], 64, False)
    once = exchange_seconds(32768, 4096, 8, GPUS["h100"], 64, True)
    assert across > 5 * inside
    assert inside < once < across


def test_log_probs_cost_about_a_third_of_a_step():
    layout = Layout(tp=8, dp=1, sequence_parallel=True)
    forward = log_prob_time(
        LLAMA_70B,
        layout,
        precision=PrecisionConfig(kind="bf16"),
        sequence_length=4096,
        global_tokens=64 * 4096,
        micro_batch_tokens=4096,
        gpu=GPUS["h100"],
    )
    assert 0.25 < forward.total_s / step(layout=layout, batch=64, length=4096).total_s < 0.4
    assert forward.optimizer_s == forward.dp_comm_s == 0


def test_experts_are_trained_at_lower_utilisation_than_a_dense_model():
    experts = step(QWEN_30B_A3B, Layout(ep=8, dp=8), batch=512, length=4096)
    dense = step(architecture_of(MODELS["llama3-8b"]), Layout(dp=8), batch=512, length=4096)
    assert experts.ep_comm_s > 0
    assert experts.mfu < dense.mfu


def test_an_optimizer_in_host_memory_is_bound_by_that_memory():
    """32 bytes a parameter over 77 GB/s against 3.35 TB/s: 44 times slower, and the link on top."""
    layout, shared = Layout(dp=8), {"precision": PrecisionConfig(kind="bf16"), "recompute": "none", "gpu": GPUS["h100"]}
    sizes = {"sequence_length": 4096, "global_tokens": 64 * 4096, "micro_batch_tokens": 4096}
    model = architecture_of(MODELS["llama3-8b"])
    device, host = (
        training_time(model, layout, features=TrainerFeatures(offload=share), **shared, **sizes).optimizer_s
        for share in (0, 1)
    )
    assert 40 < host / device < 60


def test_a_precision_that_the_gpu_lacks_is_refused():
    with pytest.raises(UserError, match="mxfp8, which H100 SXM does not run"):
        step(kind="mxfp8")
    with pytest.raises(UserError, match="no GPU called a100"):
        find_gpu("a100")
