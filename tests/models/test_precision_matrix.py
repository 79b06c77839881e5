from pathlib import Path

import pytest

from exprl_megatron import planning
from exprl_megatron.config.policy import Layout, OptimizerConfig, PolicyConfig
from exprl_megatron.config.precision import PrecisionConfig
from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.models.architecture import Architecture, read_architecture
from exprl_megatron.models.precision_matrix import Setting, precision_violations

CPU, AMPERE, ADA, HOPPER, BLACKWELL, GEFORCE = None, (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)
ONE_RANK, ADAM = Layout(), OptimizerConfig()
FP8 = ("fp8-delayed", "fp8-tensorwise", "fp8-blockwise", "mxfp8")


def published(name: str) -> Architecture:
    return read_architecture(Path(planning.__file__).parent / "architectures" / name)


def refusals(
    kind: str,
    capability: tuple[int, int] | None,
    *,
    architecture: str = "llama-3.3-70b",
    layout: Layout = ONE_RANK,
    packing: bool = True,
    optimizer: OptimizerConfig = ADAM,
    starting_weights: bool = False,
    **precision,
) -> list[str]:
    policy = PolicyConfig(
        model="none", layout=layout, packing=packing, precision=PrecisionConfig(kind=kind, **precision)
    )
    return precision_violations(Setting(policy, capability, [optimizer], published(architecture), starting_weights))


@pytest.mark.parametrize(
    ("capability", "kinds"),
    [
        (CPU, ()),
        (AMPERE, ()),
        (ADA, ("fp8-delayed", "fp8-tensorwise")),
        (HOPPER, ("fp8-delayed", "fp8-tensorwise", "fp8-blockwise")),
        (BLACKWELL, FP8),
        ((10, 3), FP8),
        (GEFORCE, ("fp8-delayed", "fp8-tensorwise", "fp8-blockwise")),
    ],
)
def test_each_generation_of_gpu_has_its_kinds(capability, kinds):
    assert tuple(kind for kind in FP8 if not refusals(kind, capability)) == kinds
    assert not refusals("bf16", capability) and not refusals("fp32", capability)


@pytest.mark.parametrize("kind", FP8)
@pytest.mark.parametrize(("capability", "emulate"), [(CPU, True), (HOPPER, False), (BLACKWELL, False)])
def test_gated_delta_nets_are_in_bf16_alone(kind, capability, emulate):
    (found,) = refusals(kind, capability, architecture="qwen3.5-27b", emulate=emulate)
    assert found.startswith(
        f"policy.precision is {kind}, in which gated delta nets, as this qwen3.5 model has them, are"
    )
    assert not refusals("bf16", capability, architecture="qwen3.5-27b")


@pytest.mark.parametrize(
    ("kind", "architecture", "distributed", "refused"),
    [
        ("bf16", "qwen3.5-27b", False, True),
        ("bf16", "qwen3.5-27b", True, False),
        ("fp32", "qwen3.5-27b", False, False),
        ("bf16", "qwen3-32b", False, False),
    ],
)
def test_parameters_of_two_dtypes_need_the_distributed_optimizer(kind, architecture, distributed, refused):
    found = refusals(kind, HOPPER, architecture=architecture, optimizer=OptimizerConfig(distributed=distributed))
    assert len(found) == refused
    assert all(sentence.startswith("optimizer.distributed is false with policy.precision bf16") for sentence in found)


@pytest.mark.parametrize("kind", FP8)
def test_emulation_is_for_machines_without_cuda_alone(kind):
    assert not refusals(kind, CPU, emulate=True)
    assert any("policy.precision.emulate is for machines" in found for found in refusals(kind, BLACKWELL, emulate=True))


@pytest.mark.parametrize(
    ("names", "refused"),
    [
        # Attention: TE's filters (DotProductAttention) and cuDNN's matrix for packed sequences.
        (dict(kind="fp8-delayed", capability=HOPPER, fp8_attention=True), "policy.packing is true"),
        (dict(kind="fp8-delayed", capability=HOPPER, fp8_attention=True, packing=False), None),
        (dict(kind="fp8-delayed", capability=BLACKWELL, fp8_attention=True), None),
        (dict(kind="fp8-delayed", capability=ADA, fp8_attention=True), "no kernel on a GPU of compute capability 8.9"),
        (dict(kind="fp8-tensorwise", capability=HOPPER, fp8_attention=True), "no kernel for fp8-tensorwise"),
        (dict(kind="fp8-tensorwise", capability=BLACKWELL, fp8_attention=True), None),
        (dict(kind="fp8-tensorwise", capability=GEFORCE, fp8_attention=True), "compute capability 12.0"),
        (dict(kind="fp8-blockwise", capability=BLACKWELL, fp8_attention=True), "no kernel for fp8-blockwise"),
        (dict(kind="mxfp8", capability=BLACKWELL, fp8_attention=True), "policy.packing is true"),
        (dict(kind="mxfp8", capability=BLACKWELL, fp8_attention=True, packing=False), None),
        # Layers in bf16.
        (dict(kind="fp8-delayed", capability=HOPPER, first_last_bf16=1), "fp8-delayed takes all layers or none"),
        (dict(kind="fp8-tensorwise", capability=HOPPER, first_last_bf16=1), None),
        (dict(kind="fp8-tensorwise", capability=HOPPER, first_last_bf16=21, layout=Layout(pp=4)), "more than the 20"),
        (dict(kind="fp8-delayed", capability=CPU, first_last_bf16=1, emulate=True), "takes all layers or none"),
        # Parameters in 8 bits.
        (dict(kind="fp8-tensorwise", capability=HOPPER, fp8_parameters=True), None),
        (dict(kind="mxfp8", capability=BLACKWELL, fp8_parameters=True), "is not available with mxfp8"),
        (
            dict(kind="fp8-tensorwise", capability=HOPPER, fp8_parameters=True, optimizer=OptimizerConfig(offload=0.5)),
            "optimizer.offload is 0.5",
        ),
        (dict(kind="fp8-tensorwise", capability=HOPPER, optimizer=OptimizerConfig(offload=0.5)), None),
        (
            dict(
                kind="fp8-blockwise",
                capability=HOPPER,
                fp8_parameters=True,
                optimizer=OptimizerConfig(distributed=False),
            ),
            "optimizer.distributed is false",
        ),
        (
            dict(kind="fp8-delayed", capability=HOPPER, fp8_parameters=True, starting_weights=True),
            "policy.ref_policy is host",
        ),
        (dict(kind="fp8-delayed", capability=HOPPER, starting_weights=True), None),
        # Layouts.
        (dict(kind="fp8-delayed", capability=HOPPER, layout=Layout(tp=2, cp=2)), "without sequence_parallel"),
        (dict(kind="fp8-delayed", capability=HOPPER, layout=Layout(tp=2, cp=2, sequence_parallel=True)), None),
        (dict(kind="bf16", capability=HOPPER, layout=Layout(tp=2, cp=2)), None),
        (dict(kind="fp8-tensorwise", capability=HOPPER, architecture="qwen2.5-72b", layout=Layout(tp=8)), None),
        (
            dict(kind="mxfp8", capability=BLACKWELL, architecture="qwen2.5-72b", layout=Layout(tp=8)),
            "leaves a rank 3696 of the model's 29568 MLP columns",
        ),
        # Settings of nothing.
        (dict(kind="bf16", capability=HOPPER, fp8_attention=True), "policy.precision.fp8_attention is True but"),
        (dict(kind="bf16", capability=HOPPER, first_last_bf16=2), "policy.precision.first_last_bf16 is 2 but"),
        (dict(kind="fp32", capability=CPU, fp8_parameters=True), "policy.precision.fp8_parameters is True but"),
    ],
)
def test_settings_that_exclude_each_other_are_refused_in_one_sentence(names, refused):
    found = refusals(**names)
    if refused is None:
        assert found == []
    else:
        assert len(found) == 1 and refused in found[0]


def test_all_that_is_wrong_is_said_at_once_each_with_setting_and_remedy():
    found = refusals(
        "mxfp8",
        HOPPER,
        layout=Layout(tp=8, cp=2),
        optimizer=OptimizerConfig(distributed=False, offload=1.0),
        architecture="qwen2.5-72b",
        fp8_parameters=True,
        fp8_attention=True,
        starting_weights=True,
        emulate=True,
    )
    assert len(found) == len(set(found)) == 9
    for sentence in found:
        assert sentence.count("\n") == 0 and sentence.endswith(".") and ";" in sentence
        assert "policy." in sentence or "optimizer." in sentence


def fp32(servers=("server",), cuda=True, colocated=False, extra_args=(), kind="fp32", **layout) -> list[str]:
    policy = PolicyConfig(model="none", precision=PrecisionConfig(kind=kind), layout=Layout(**layout))
    config = ServerConfig(extra_args=extra_args)
    return precision_violations(
        Setting(policy, None, cuda=cuda, servers=dict.fromkeys(servers, config), colocated=colocated)
    )


def test_fp32_is_not_served_on_cuda():
    (sentence,) = fp32()
    assert sentence == (
        "policy.precision is fp32, in which SGLang's attention kernels on CUDA do not compute, and server would serve "
        "it; choose bf16."
    )
    assert [found.split(" and ")[1] for found in fp32(("server", "judge.server"))] == [
        "server would serve it; choose bf16.",
        "judge.server would serve it; choose bf16.",
    ]


def test_fp32_may_train_alone_on_cuda_and_everything_on_a_cpu():
    assert fp32(servers=()) == fp32(cuda=False, colocated=True, cp=2) == fp32(kind="bf16", colocated=True, cp=2) == []


def test_an_attention_backend_that_the_user_names_is_the_users_choice():
    assert fp32(extra_args=("--attention-backend", "triton")) == fp32(extra_args=("--attention-backend=triton",)) == []
    assert len(fp32(extra_args=("--attention-backend-of-another-kind",))) == 1


def test_colocated_fp32_and_context_parallel_fp32_are_refused_on_cuda_whatever_serves_them():
    named = ("--attention-backend", "triton")
    (colocated,) = fp32(colocated=True, extra_args=named)
    assert "placement.kind colocated" in colocated and "choose bf16" in colocated
    (context,) = fp32(cp=2, extra_args=named)
    assert "policy.layout.cp is 2" in context and "choose bf16" in context


@pytest.mark.parametrize(
    ("tp", "etp", "kind", "leaves"),
    [
        (2, 1, "mxfp8", []),
        (1, 8, "fp8-tensorwise", []),
        (1, 8, "mxfp8", ["176 of the model's 1408 expert columns"]),
        (4, 1, "mxfp8", ["2736 of the model's 10944 MLP columns"]),
        (8, 1, "fp8-tensorwise", ["1368 of the model's 10944 MLP columns"]),
        (8, 1, "mxfp8", ["1368 of the model's 10944 MLP columns", "176 of the model's 1408 shared expert's columns"]),
    ],
)
def test_dense_layers_experts_and_the_shared_expert_must_all_fit_the_products(tp, etp, kind, leaves):
    layout = Layout(tp=tp, etp=etp, dp=8, sequence_parallel=tp > 1)
    found = refusals(kind, BLACKWELL, architecture="glm-4.5-air", layout=layout)
    assert [sentence.partition("leaves a rank ")[2].partition(";")[0] for sentence in found] == leaves


@pytest.mark.parametrize("kind", ["fp8-delayed", "fp8-tensorwise", "mxfp8"])
def test_attention_with_windows_has_no_kernel_in_8_bits(kind):
    layout, settings = Layout(tp=4, sequence_parallel=True), {"fp8_attention": True, "packing": False}
    assert refusals(kind, BLACKWELL, architecture="qwen3-32b", layout=layout, **settings) == []
    (found,) = refusals(kind, BLACKWELL, architecture="olmo-3-32b", layout=layout, **settings)
    assert "fp8_attention has no kernel for attention with windows" in found
    assert refusals(kind, BLACKWELL, architecture="olmo-3-32b", layout=layout) == []
