"""What is known to fit, and what is known not to: published runs, and arithmetic that leaves no choice."""

import pytest
from validate_planner import architecture_of, published_rows

from exprl_megatron.config.policy import Layout, OptimizerConfig, PolicyConfig
from exprl_megatron.errors import UserError
from exprl_megatron.planning.hardware import GPUS, find_gpu
from exprl_megatron.planning.layouts import legal_layouts
from exprl_megatron.planning.memory import USABLE, training_memory
from exprl_megatron.planning.plan_request import plan_target
from exprl_megatron.planning.targets import find_architecture
from exprl_megatron.planning.training_time import micro_batches

PUBLISHED = published_rows()
TIGHT = {("nemotron4-340b", 128), ("llama2-70b", 16)}
"""Model and GPUs of what ran although the planner holds it to be too large, by less than a fifth."""


def published_runs():
    """Whole models trained without recomputation and FSDP, each as it is laid out."""
    for row in PUBLISHED["training"]:
        if not (row["features"].get("fsdp") or row["features"].get("lora") or row.get("recompute")):
            yield row


def peak(row: dict) -> float:
    """Bytes on the fullest rank, gradients as wide as the row's, FP8 weights in 8 bits alone as NVIDIA's recipes do."""
    layout, length = Layout(**row["layout"]), row["sequence_length"]
    kind = row["precision"]
    policy = PolicyConfig(
        model="none",
        layout=layout,
        precision={"kind": kind, "fp8_parameters": kind.startswith("fp8")},
        micro_batch_tokens=row["micro_batch"] * length,
        max_tokens=length,
    )
    count = micro_batches(layout, row["global_batch"] * length, policy.micro_batch_tokens)
    architecture, gpu = architecture_of(PUBLISHED["models"][row["model"]]), find_gpu(row["gpu"])
    stages = [training_memory(architecture, policy, OptimizerConfig(), r, count, gpu) for r in range(layout.pp)]
    narrower = 1 - row["features"]["gradient_bytes"] / 4
    return max(memory.total - memory.gradients * narrower for memory in stages)


def test_what_was_trained_on_80_gb_fits():
    runs = [row for row in published_runs() if row["gpu"] == "h100"]
    found = [(row["model"], row["gpus"], peak(row) / (GPUS["h100"].memory_bytes * USABLE)) for row in runs]
    assert len(found) >= 60
    assert {(model, gpus) for model, gpus, share in found if share > 1} == TIGHT
    assert max(share for _, _, share in found) < 1.2


def test_a_70b_needs_more_than_one_node_of_h100_to_be_trained_with_adam():
    """70.6e9 x (2 + 4 + 12) bytes are 1,183 GiB; eight GPUs have 633, two nodes 1,266 less what else must be there."""
    with pytest.raises(UserError, match=r"take 1,183 GiB at least, and 601 GiB may be filled"):
        plan_target("llama-3.3-70b", [], GPUS["h100"], gpus=8, train_only=True)
    with pytest.raises(UserError, match="take 1,183 GiB at least"):
        plan_target("llama-3.3-70b", [], GPUS["h100"], gpus=16, train_only=True)
    assert plan_target("llama-3.3-70b", [], GPUS["h100"], gpus=32, train_only=True).ranking.layouts


def test_the_large_experts_need_offloading_on_64_h100():
    """235e9 x 18 bytes are 3,941 GiB of 4,808, and every layout repeats some of it."""
    tight = plan_target("qwen3-235b-a22b", [], GPUS["h100"], gpus=64, train_only=True).ranking
    offloaded = plan_target(
        "qwen3-235b-a22b", ["stages.0.optimizer.offload=1.0"], GPUS["h100"], gpus=64, train_only=True
    ).ranking
    assert tight.fit_without_recompute == 0
    assert (
        offloaded.fit_without_recompute > 0
        and offloaded.fit_without_recompute + offloaded.fit_with_recompute > tight.fit_with_recompute
    )


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_saves_what_it_says(recompute):
    """Flash attention keeps one number per token and head; full recomputation keeps a layer's input of some 34 h bytes
    (arXiv 2205.05198 with SwiGLU and grouped queries)."""
    architecture = find_architecture("llama-3.1-8b")[0]
    plain, less = (
        training_memory(
            architecture,
            PolicyConfig(model="none", precision="bf16", recompute=kind, micro_batch_tokens=8192),
            OptimizerConfig(),
            0,
            8,
        ).activations
        for kind in ("none", recompute)
    )
    assert less / plain == pytest.approx({"selective": 1, "full": 2 / 34}[recompute], abs=0.06)


def test_interleaved_pipelines_take_micro_batches_in_groups():
    """Megatron refuses others (megatron.core.pipeline_parallel.schedules)."""
    layout = Layout(pp=4, vpp=2, dp=3)
    for tokens in (1, 50_000, 100_000, 1_000_000):
        assert micro_batches(layout, tokens, 8192) % 4 == 0
    assert micro_batches(Layout(pp=4, dp=3), 50_000, 8192) == 3


def test_a_smaller_gpu_never_fits_more():
    architecture = find_architecture("qwen3-32b")[0]
    policy = PolicyConfig(model="none", precision="bf16", max_tokens=8192)
    layouts = list(legal_layouts(architecture, policy, OptimizerConfig(), GPUS["h100"], 16))
    fits = {
        name: sum(
            all(
                training_memory(
                    architecture, policy.model_copy(update={"layout": layout}), OptimizerConfig(), rank, 16, GPUS[name]
                ).excess_bytes(GPUS[name])
                <= 0
                for rank in range(layout.pp)
            )
            for layout in layouts
        )
        for name in ("h100", "h200", "b200")
    }
    assert 0 < fits["h100"] < fits["h200"] < fits["b200"]
