"""GLM-4.5 to 4.7: what its config.json says, and what is refused since one of the libraries computes it otherwise."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from exprl_megatron import planning
from exprl_megatron.config.policy import Layout
from exprl_megatron.errors import UserError
from exprl_megatron.models.architecture import Experts, layout_violations, read_architecture
from exprl_megatron.models.flops import model_flops
from exprl_megatron.models.left_out import left_out_tensors
from exprl_megatron.models.name_map import dtype_of, hf_shapes, parameters
from exprl_megatron.models.shards import shapes_in_words
from exprl_megatron.models.stored_parameters import stored_parameters
from exprl_megatron.models.weight_readers import Safetensors
from exprl_megatron.planning.parameters import model_parameters

ARCHITECTURES = Path(planning.__file__).parent / "architectures"
AIR = json.loads((ARCHITECTURES / "glm-4.5-air" / "config.json").read_text())

DEFAULTS = ("attention_bias", "use_qk_norm", "partial_rotary_factor", "first_k_dense_replace", "norm_topk_prob")


def written(directory: Path, tree: dict) -> Path:
    (directory / "config.json").write_text(json.dumps(tree))
    return directory


def without(*names: str) -> dict:
    return {key: value for key, value in AIR.items() if key not in names}


def test_air_is_read_as_published():
    air = read_architecture(ARCHITECTURES / "glm-4.5-air")
    assert air.experts == Experts(
        count=128,
        top_k=8,
        ffn=1408,
        norm_topk_prob=True,
        dense_layers=1,
        shared_ffn=1408,
        sigmoid=True,
        scaling=1.0,
    )
    assert (air.qk_norm, air.qkv_bias, air.rotary_share, air.head_dim) == (False, True, 0.5, 128)
    assert air.left_out == ("model.layers.46.",)


@pytest.mark.parametrize(("name", "billions", "active"), [("glm-4.5-air", 106.85, 12.80), ("glm-4.5", 352.80, 32.85)])
def test_both_sizes_have_the_parameters_that_their_names_say(name, billions, active):
    # The names count 106B-A12B, and 355B-A32B with the layer of multi-token prediction.
    architecture = read_architecture(ARCHITECTURES / name)
    assert model_parameters(architecture) / 1e9 == pytest.approx(billions, abs=0.01)
    assert model_flops(architecture, 0.0, training=False) / 2e9 == pytest.approx(active, abs=0.01)


def test_layers_at_the_beginning_have_no_experts():
    architecture = read_architecture(ARCHITECTURES / "glm-4.5")
    assert [architecture.of_layer(layer).experts is None for layer in (0, 2, 3, 91)] == [True, True, False, False]
    assert list(architecture.kinds().values()) == [3, 89]
    assert list(architecture.kinds(range(2, 5)).values()) == [1, 2]
    assert list(architecture.kinds(range(50, 60)).values()) == [10]
    assert read_architecture(ARCHITECTURES / "glm-4.5-air").of_layer(5).of_layer(0).experts is not None


def test_what_is_left_out_of_config_json_is_as_transformers_has_it(tmp_path):
    found = read_architecture(
        written(
            tmp_path,
            without(*DEFAULTS),
        )
    )
    assert (found.qkv_bias, found.qk_norm, found.rotary_share) == (False, False, 0.5)
    assert (found.experts.dense_layers, found.experts.scaling) == (1, 1.0)


def test_settings_are_read_under_the_names_that_transformers_5_writes(tmp_path):
    tree = without("rope_theta", "rope_scaling", "partial_rotary_factor", "num_nextn_predict_layers")
    tree["rope_parameters"] = {"rope_type": "default", "rope_theta": 1000000, "partial_rotary_factor": 0.5}
    tree["num_mtp_layers"] = 1
    assert read_architecture(written(tmp_path, tree)) == read_architecture(ARCHITECTURES / "glm-4.5-air")
    assert read_architecture(written(tmp_path, tree | {"num_mtp_layers": 0})).left_out == ()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"norm_topk_prob": False}, "has norm_topk_prob false"),
        ({"n_group": 2, "topk_group": 1}, "has n_group 2 and topk_group 1"),
        ({"n_group": 4, "topk_group": 4}, "has n_group 4 and topk_group 4"),
        ({"num_experts_per_tok": 1}, "has one expert for each token"),
        ({"n_shared_experts": 0}, "has n_shared_experts 0"),
        ({"n_shared_experts": 2}, "has n_shared_experts 2"),
        ({"first_k_dense_replace": 46}, "has first_k_dense_replace 46, which leaves no layer with experts"),
        ({"first_k_dense_replace": -1}, "has first_k_dense_replace -1"),
        ({"routed_scaling_factor": 0}, "has routed_scaling_factor 0"),
        ({"tie_word_embeddings": True}, "has tie_word_embeddings, which SGLang does not know"),
        ({"hidden_act": "gelu"}, "has hidden_act gelu"),
        ({"quantization_config": {"quant_method": "fp8"}}, "has quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "has rope type yarn where a share of each head turns"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "has rope type linear where a share"),
        ({"partial_rotary_factor": 1.5}, "has partial_rotary_factor 1.5"),
        ({"partial_rotary_factor": 0}, "has partial_rotary_factor 0"),
        ({"partial_rotary_factor": 0.51}, "has partial_rotary_factor 0.51 of heads of 128 dimensions"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000, "partial_rotary_factor": 1.0}},
            "has more than one partial_rotary_factor",
        ),
    ],
    ids=str,
)
def test_what_one_of_the_libraries_would_compute_otherwise_is_refused_by_name(tmp_path, change, said):
    with pytest.raises(UserError, match=said):
        read_architecture(written(tmp_path, AIR | change))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen3MoeForCausalLM"])
def test_a_share_of_a_head_turns_in_no_other_family(tmp_path, name):
    with pytest.raises(UserError, match=r"partial_rotary_factor 0\.5"):
        read_architecture(
            written(tmp_path, AIR | {"architectures": [name], "model_type": None, "attention_bias": False})
        )


def test_tensor_parallelism_must_divide_dense_layers_and_shared_experts():
    air = read_architecture(ARCHITECTURES / "glm-4.5-air")
    fits = Layout(tp=8, dp=1, sequence_parallel=True, pp=2)
    assert layout_violations(air, fits) == []
    narrow = replace(air, ffn=10946, experts=replace(air.experts, shared_ffn=1410))
    assert [sentence.partition("divide ")[2].partition(";")[0] for sentence in layout_violations(narrow, fits)] == [
        "the model's 10946 MLP columns",
        "the model's 1410 shared expert's columns",
    ]


def test_the_bias_of_the_router_is_a_buffer_in_fp32_and_nothing_else_is():
    air = read_architecture(ARCHITECTURES / "glm-4.5-air")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    shapes = {name: shape for name, shape in hf_shapes(air).items() if name.startswith("model.layers.1.")}
    assert [name for name in shapes if dtype_of(name, "bfloat16") != "bfloat16"] == [bias]
    assert dtype_of(bias, "float32") == "float32"
    buffers = [entry for entry in parameters(air, Layout()) if entry.is_buffer]
    assert len(buffers) == 45
    assert (buffers[0].name, buffers[0].hf_names) == ("decoder.layers.1.mlp.router.expert_bias", (bias,))
    words = shapes_in_words(shapes, "bfloat16")
    assert words.pop(bias) == (256,) and shapes.pop(bias) == (128,)
    assert words == shapes


def test_where_layers_differ_each_has_tensors_of_its_own_in_megatron_s_files():
    table = stored_parameters(read_architecture(ARCHITECTURES / "glm-4.5-air"))
    keys = {stored.key: (stored.index, stored.counts) for stored in table}
    assert keys["decoder.layers.0.mlp.linear_fc1.weight"] == ((), ())
    assert keys["decoder.layers.1.mlp.router.expert_bias"] == ((), ())
    assert keys["decoder.layers.1.mlp.experts.experts.linear_fc2.weight"] == ((127,), (128,))
    assert keys["decoder.layers.1.mlp.shared_experts.linear_fc2.weight"] == ((), ())


def test_a_layer_of_multi_token_prediction_is_not_read_but_known(tiny_model):
    model = tiny_model("glm4-moe", mtp=True)
    architecture = read_architecture(model)
    with Safetensors(model, architecture) as source:
        assert source.has("model.layers.2.eh_proj.weight")
    found = left_out_tensors(model, architecture)
    extra = {name for name in load_file(model / "model.safetensors") if name.startswith("model.layers.2.")}
    assert len(extra) > 20 and found.keys() == extra
    assert left_out_tensors(tiny_model("glm4-moe"), architecture) == {}


def test_tensors_that_are_on_no_list_are_refused(tiny_model):
    model = tiny_model("glm4-moe", mtp=True)
    for known, name in (
        (replace(read_architecture(model), left_out=()), "model.layers.2.e"),
        # The number of a layer is not the beginning of another's.
        (replace(read_architecture(model), left_out=("model.layers.20.",)), "model.layers.2.e"),
    ):
        with pytest.raises(UserError, match=f"has the unknown tensor {name}"):
            Safetensors(model, known)


def test_experts_that_are_stored_in_one_tensor_are_refused_with_the_remedy(tiny_model, tmp_path):
    model = tiny_model("glm4-moe")
    tensors = load_file(model / "model.safetensors")
    prefix = "model.layers.1.mlp.experts."
    joined = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    joined[f"{prefix}gate_up_proj"] = torch.stack(
        [torch.cat([tensors[f"{prefix}{i}.{x}_proj.weight"] for x in ("gate", "up")]) for i in range(4)]
    )
    joined[f"{prefix}down_proj"] = torch.stack([tensors[f"{prefix}{i}.down_proj.weight"] for i in range(4)])
    save_file(joined, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"all experts of a layer in one tensor \(model\.layers\.1\..*save_pretrained"):
        Safetensors(tmp_path, read_architecture(model))
