"""Compares the models of training and step time with published figures: `python tools/validate_planner.py`."""

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from exprl_megatron.config.policy import Layout
from exprl_megatron.config.precision import PrecisionConfig
from exprl_megatron.models.architecture import Architecture, Experts
from exprl_megatron.models.flops import linear_parameters, model_flops
from exprl_megatron.planning.hardware import Gpu, find_gpu
from exprl_megatron.planning.links import NIC_EFFICIENCY, NVLINK_EFFICIENCY
from exprl_megatron.planning.rl_time import PlannedStepTime, sampling_time, step_time
from exprl_megatron.planning.serving_time import LengthDistribution, ServerHardware
from exprl_megatron.planning.trainer_features import TrainerFeatures
from exprl_megatron.planning.training_time import TrainingTime, log_prob_time, training_time

PUBLISHED = Path(__file__).with_name("published_throughput.json")


@dataclass(frozen=True)
class Comparison:
    """A published figure and what the model says."""

    row: dict
    published: float
    """Tokens/s per GPU."""
    time: TrainingTime

    @property
    def error(self) -> float:
        """Predicted over published, less 1."""
        return self.time.tokens_per_s_per_gpu / self.published - 1

    @property
    def label(self) -> str:
        """Model, GPUs, precision and layout in one line."""
        row = self.row
        layout = " ".join(f"{k}{v}" for k, v in row["layout"].items() if isinstance(v, int) and v is not True)
        extra = " ".join(name for name in ("fsdp", "lora") if row["features"].get(name))
        parts = (row["model"], f"{row['gpus']}x{row['gpu']}", row["precision"], layout, extra)
        return " ".join(part for part in parts if part) + f" seq {row['sequence_length']} batch {row['global_batch']}"


def published_rows(path: Path = PUBLISHED) -> dict:
    """Return the file of published figures: `models`, `sources`, `training`, `reinforcement_learning`."""
    return json.loads(path.read_text(encoding="utf-8"))


def architecture_of(fields: dict) -> Architecture:
    """Return the architecture of a row's model; what does not decide its time is filled in."""
    experts = fields.get("experts")
    return Architecture(
        family="mixtral" if experts else "llama",
        layers=fields["layers"],
        hidden=fields["hidden"],
        heads=fields["heads"],
        kv_groups=fields["kv_groups"],
        head_dim=fields["head_dim"],
        ffn=fields["ffn"],
        vocabulary=fields["vocabulary"],
        norm_eps=1e-5,
        rope_base=10000.0,
        rope_scaling=None,
        qk_norm=False,
        qkv_bias=False,
        tied=fields["tied"],
        max_positions=131072,
        initializer_range=0.02,
        experts=Experts(experts["count"], experts["chosen"], experts["ffn"], True) if experts else None,
    )


def counted_flops(architecture: Architecture, sequence_length: int) -> float:
    """Operations per token as Megatron-LM counts them for its log: a training step, attention not halved."""
    causal = model_flops(architecture, sequence_length)
    return 2 * causal - model_flops(architecture, 0)


def compare(row: dict, models: dict) -> Comparison:
    """Compare one published row with the model's answer."""
    architecture = architecture_of(models[row["model"]])
    length = row["sequence_length"]
    time = training_time(
        architecture,
        Layout(**row["layout"]),
        precision=PrecisionConfig(kind=row["precision"]),
        recompute=row.get("recompute", "none"),
        sequence_length=length,
        global_tokens=row["global_batch"] * length,
        micro_batch_tokens=row["micro_batch"] * length,
        gpu=find_gpu(row["gpu"]),
        features=TrainerFeatures(**row["features"]),
    )
    published = row.get("tokens_per_s_per_gpu")
    if published is None:
        published = row["counted_tflops_per_gpu"] * 1e12 / counted_flops(architecture, length)
    return Comparison(row, published, time)


@dataclass(frozen=True)
class StepComparison:
    """A published reinforcement-learning step and what the model says."""

    row: dict
    time: PlannedStepTime

    @property
    def error(self) -> float:
        """Predicted over published seconds, less 1."""
        return self.time.total_s / self.row["step_s"] - 1

    @property
    def label(self) -> str:
        """Model, GPUs and kind of step."""
        row = self.row
        mode = "one step off" if row["one_step_off"] else "in turn"
        return f"{row['model']} {row['gpus']}x{row['gpu']} {row['precision']} {mode} mean {row['mean_length']}"


PROMPT_TOKENS = 100
"""Of the problems in NeMo-RL's rows, whose mean length counts prompt and response."""


def compare_step(row: dict, models: dict) -> StepComparison:
    """Compare one of NeMo-RL's steps with the model's answer: half of the GPUs sample where the step is one off."""
    architecture, layout, gpu = architecture_of(models[row["model"]]), Layout(**row["layout"]), find_gpu(row["gpu"])
    off, fp8 = row["one_step_off"], row["precision"] != "bf16"
    servers = ServerHardware(
        (row["gpus"] // 2 if off else row["gpus"]) // row["server_tp"],
        row["server_tp"],
        gpu,
        weight_bytes=1.0 if fp8 else 2.0,
        memory_share=0.8 if off else 0.6,
    )
    shared = {
        "precision": PrecisionConfig(kind=row["precision"]),
        "sequence_length": row["mean_length"],
        "global_tokens": row["problems"] * row["traces"] * row["mean_length"],
        "gpu": gpu,
    }
    forward = log_prob_time(architecture, layout, micro_batch_tokens=row["log_prob_batch"] * row["bound"], **shared)
    time = step_time(
        sampling=sampling_time(
            architecture,
            servers,
            problems=row["problems"],
            traces=row["traces"],
            prompt_tokens=PROMPT_TOKENS,
            answers=LengthDistribution(row["mean_length"] - PROMPT_TOKENS, row["bound"] - PROMPT_TOKENS),
        ),
        judging_s=0.0,
        log_probs=[forward, forward],
        training=training_time(architecture, layout, recompute="none", micro_batch_tokens=row["bound"], **shared),
        reshard_s=_refit_seconds(architecture, layout, gpu, colocated=not off, each=servers.weight_bytes),
        one_step_off=off,
    )
    return StepComparison(row, time)


def weight_bytes(architecture: Architecture, each: float = 2.0) -> float:
    """Return bytes of the model's matrices at `each` bytes, embedding and output layer in BF16."""
    dense, experts = linear_parameters(architecture)
    vocabulary = architecture.vocabulary * architecture.hidden * (1 if architecture.tied else 2)
    return (dense + experts) * each + vocabulary * 2.0


def _refit_seconds(architecture: Architecture, layout: Layout, gpu: Gpu, *, colocated: bool, each: float) -> float:
    """Return seconds that NeMo-RL needs to carry the new weights to its generation workers, `each` bytes a weight.

    Colocated: every rank gathers each whole tensor, over NVLink what is in its node and over its card the rest.
    Separate: one trainer rank sends everything through its card, and the workers receive it as a chain. Our own syncs
    are planned from their messages (sync_time.py).
    """
    size = weight_bytes(architecture, each)
    if not colocated:
        return size / (gpu.nic_bytes_per_s * NIC_EFFICIENCY) + size / (gpu.nvlink_bytes_per_s * NVLINK_EFFICIENCY)
    holders = layout.tp * layout.pp * max(1, layout.ep // layout.tp)
    outside = max(0.0, 1 - gpu.gpus_per_node / holders)
    inside = size * (1 - outside) / (gpu.nvlink_bytes_per_s * NVLINK_EFFICIENCY)
    return inside + size * outside / (gpu.nic_bytes_per_s * NIC_EFFICIENCY)


def step_comparisons(path: Path = PUBLISHED) -> list[StepComparison]:
    """Compare every published reinforcement-learning step with the model's."""
    published = published_rows(path)
    return [compare_step(row, published["models"]) for row in published["reinforcement_learning"]]


def comparisons(path: Path = PUBLISHED) -> list[Comparison]:
    """Compare every published training figure with the model's."""
    published = published_rows(path)
    return [compare(row, published["models"]) for row in published["training"]]


def spread(errors: list[float]) -> str:
    """Return how far off `errors` are: number, median and worst of their sizes, and the median with its sign."""
    sizes = [abs(error) for error in errors]
    within = sum(size <= 0.25 for size in sizes)
    return (
        f"{len(sizes)} rows, median {median(sizes):.1%}, worst {max(sizes):.1%}, {within} within 25 %, "
        f"bias {median(errors):+.1%}"
    )


def main() -> None:
    """Print every row, then the errors by set and by group."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for step in step_comparisons():
        time = step.time
        print(
            f"{step.row['set']:11s} {step.label:62s} {step.row['step_s']:6.1f} s {time.total_s:6.1f} s "
            f"{step.error:+7.1%}  sample {time.sampling_s:.0f} log-probs {time.log_probs_s:.0f} "
            f"train {time.training_s:.0f} reshard {time.reshard_s:.1f}"
        )
    found = comparisons()
    sets: dict[str, list[float]] = defaultdict(list)
    for one in found:
        sets[one.row["set"]].append(one.error)
        if one.row["set"] == "held-out":
            sets[f"held-out, {one.row['group']}"].append(one.error)
        print(
            f"{one.row['set']:11s} {one.label:95s} {one.published:8,.0f} {one.time.tokens_per_s_per_gpu:8,.0f} "
            f"{one.error:+7.1%}  {one.row['source']}"
        )
    for name, errors in sets.items():
        print(f"{name}: {spread(errors)}")


if __name__ == "__main__":
    main()
