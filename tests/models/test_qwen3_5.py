"""Qwen3.5 and 3.6: what config.json says, names and sharding, and what is refused as libraries compute it otherwise."""

import json
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import write_tiny_vision_model
from safetensors.torch import load_file
from transformers import Qwen3_5TextConfig

from exprl_megatron import planning
from exprl_megatron.config.policy import Layout
from exprl_megatron.errors import UserError
from exprl_megatron.models.architecture import Experts, layout_violations, read_architecture
from exprl_megatron.models.delta_net import DeltaNet
from exprl_megatron.models.flops import attention_flops, model_flops
from exprl_megatron.models.left_out import left_out_tensors
from exprl_megatron.models.name_map import dtype_of, hf_shapes, parameters
from exprl_megatron.models.rules import GatedQueryKeyValue, spans
from exprl_megatron.models.shards import holders
from exprl_megatron.models.stored_parameters import stored_parameters
from exprl_megatron.models.weight_readers import RandomWeights, Safetensors, read_parts
from exprl_megatron.planning.memory import kv_bytes_per_token
from exprl_megatron.planning.parameters import model_parameters
from exprl_megatron.planning.serving_time import state_bytes
from exprl_megatron.weight_sync.shard_table import shard_table

PUBLISHED = Path(planning.__file__).parent / "architectures" / "qwen3.5-27b"
TREE = json.loads((PUBLISHED / "config.json").read_text())


MIXTURE = {"architectures": ["Qwen3_5MoeForConditionalGeneration"]}
SHARED = {"num_experts": 8, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512}


def written(directory: Path, outer: dict, **text) -> Path:
    tree = TREE | outer
    (directory / "config.json").write_text(json.dumps(tree | {"text_config": tree["text_config"] | text}))
    return directory


def test_the_language_model_of_a_vision_model_is_read():
    found = read_architecture(PUBLISHED)
    assert found.delta_net == DeltaNet(key_heads=16, value_heads=48, key_dim=128, value_dim=128, kernel=4)
    assert found.layer_types == (("linear_attention",) * 3 + ("full_attention",)) * 16
    assert (found.rotary_share, found.rope_base, found.head_dim, found.qk_norm) == (0.25, 1e7, 256, True)
    assert (found.output_gate, found.zero_centered_norms, found.tied) == (True, True, False)
    assert (found.prefix, found.left_out) == ("model.language_model.", ("model.visual.", "mtp."))
    assert [kind.delta_net is None for kind in found.kinds()] == [False, True]
    assert list(found.kinds().values()) == [48, 16]
    assert model_parameters(found) / 1e9 == pytest.approx(26.9, abs=0.05)


def test_the_mixture_of_the_vision_model_is_read():
    found = read_architecture(PUBLISHED.with_name("qwen3.5-35b-a3b"))
    assert found.experts == Experts(
        count=256,
        top_k=8,
        ffn=512,
        norm_topk_prob=True,
        shared_ffn=512,
        shared_gate=True,
        sigmoid=False,
        scaling=1.0,
    )
    assert found.delta_net == DeltaNet(key_heads=16, value_heads=32, key_dim=128, value_dim=128, kernel=4)
    assert (found.output_gate, found.zero_centered_norms, found.left_out) == (True, True, ("model.visual.", "mtp."))
    # 40 layers of 256 experts, a shared one with its gate, and a router; 30 delta nets, 10 attentions; vocabularies.
    experts = 40 * (257 * 3 * 2048 * 512 + 257 * 2048)
    nets = 30 * (2048 * 12352 + 8192 * 4 + 2 * 32 + 128 + 4096 * 2048)
    attention = 10 * (2048 * (2 * 4096 + 2 * 512) + 2 * 256 + 4096 * 2048)
    assert model_parameters(found) == experts + nets + attention + 40 * 2 * 2048 + 2 * 248320 * 2048 + 2048
    assert any("2 KV groups; use one of 1, 2" in said for said in layout_violations(found, Layout(tp=4)))


def test_the_text_model_is_the_same_under_other_names(tmp_path):
    text = TREE["text_config"] | {"architectures": ["Qwen3_5ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(text))
    found, published = read_architecture(tmp_path), read_architecture(PUBLISHED)
    assert (found.prefix, found.left_out) == ("model.", ("mtp.",))
    shapes = {name.replace("model.", "model.language_model.", 1): s for name, s in hf_shapes(found).items()}
    assert shapes == hf_shapes(published)


def test_what_is_left_out_of_config_json_is_as_transformers_has_it(tmp_path):
    names = ("full_attention_interval", "head_dim", "attn_output_gate", "linear_conv_kernel_dim")
    tree = {key: value for key, value in TREE["text_config"].items() if key not in names}
    tree["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000000}
    (tmp_path / "config.json").write_text(json.dumps(TREE | {"text_config": tree}))
    assert read_architecture(tmp_path) == read_architecture(PUBLISHED)


def test_a_text_model_turns_the_share_of_a_head_that_transformers_turns(tmp_path):
    tree = {key: value for key, value in TREE["text_config"].items() if key != "rope_parameters"}
    rope = {"rope_type": "default", "rope_theta": 10000000}
    (tmp_path / "config.json").write_text(
        json.dumps(tree | {"architectures": ["Qwen3_5ForCausalLM"], "rope_parameters": rope})
    )
    share = Qwen3_5TextConfig(rope_parameters=rope).rope_parameters["partial_rotary_factor"]
    assert read_architecture(tmp_path).rotary_share == share == 0.25


@pytest.mark.parametrize(
    ("outer", "text", "said"),
    [
        ({}, {"layer_types": ["full_attention"] * 64}, "has layer_types that are not one layer of full_attention"),
        ({}, {"full_attention_interval": 0}, "has full_attention_interval 0"),
        ({}, {"attn_output_gate": False}, "has attn_output_gate false"),
        ({}, {"output_gate_type": "sigmoid"}, "has output_gate_type sigmoid"),
        ({}, {"linear_num_value_heads": 40}, "has linear_num_value_heads 40, which linear_num_key_heads 16"),
        ({}, {"attention_bias": True}, "has attention_bias"),
        ({}, {"num_experts": 8}, "has experts"),
        (MIXTURE, {"norm_topk_prob": False} | SHARED, "has norm_topk_prob false"),
        (MIXTURE, {"moe_intermediate_size": 512, "num_experts": 8, "num_experts_per_tok": 2}, "has no shared expert"),
        (MIXTURE, {"num_experts_per_tok": 1} | SHARED, "has one expert for each token"),
        ({"tie_word_embeddings": True}, {}, "has tie_word_embeddings true and another value in text_config"),
        ({}, {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "has rope type yarn where a share"),
        ({}, {"quantization_config": {"quant_method": "fp8"}}, "has quantization_config"),
    ],
    ids=str,
)
def test_what_one_of_the_libraries_would_compute_otherwise_is_refused_by_name(tmp_path, outer, text, said):
    with pytest.raises(UserError, match=said):
        read_architecture(written(tmp_path, outer, **text))


def test_a_vision_model_without_text_settings_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TREE | {"text_config": None}))
    with pytest.raises(UserError, match="lacks text_config"):
        read_architecture(tmp_path)


def test_layouts_must_divide_the_heads_of_both_kinds_and_leave_sequences_whole():
    found = read_architecture(PUBLISHED)
    assert layout_violations(found, Layout(tp=4, pp=2, sequence_parallel=True)) == []
    (context,) = layout_violations(found, Layout(cp=2))
    assert context.startswith("policy.layout.cp is 2, but the model's gated delta net layers need each sequence whole")
    assert any("4 KV groups; use one of 1, 2, 4" in said for said in layout_violations(found, Layout(tp=8)))


def test_the_decay_rate_is_a_parameter_in_fp32_and_nothing_else_is():
    found = read_architecture(PUBLISHED)
    kept = {name for name in hf_shapes(found) if dtype_of(name, "bfloat16") == "float32"}
    assert len(kept) == 48 and all(name.endswith(".linear_attn.A_log") for name in kept)
    assert not any(entry.is_buffer for entry in parameters(found, Layout()))
    assert sum(entry.keeps_dtype for entry in parameters(found, Layout())) == 48


def test_a_head_s_query_and_gate_are_apart_in_megatron():
    # Two groups of two heads of one dimension: numbers are 10 x head for a query, and 1 more for its gate.
    rule = GatedQueryKeyValue(heads_per_group=2, head_dim=1)
    both = torch.tensor([0, 1, 10, 11, 20, 21, 30, 31])[:, None]
    key, value = torch.tensor([100, 200])[:, None], torch.tensor([101, 201])[:, None]
    merged = rule.merge((both, key, value))
    assert merged[:, 0].tolist() == [0, 10, 1, 11, 100, 101, 20, 30, 21, 31, 200, 201]
    assert all(torch.equal(a, b) for a, b in zip(rule.parts(merged), (both, key, value), strict=True))


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_section_is_cut_by_heads_and_joined_again(tiny_model, ranks):
    architecture = read_architecture(tiny_model("qwen3.5"))
    net, shapes = architecture.delta_net, hf_shapes(architecture)
    entry = next(e for e in parameters(architecture, Layout()) if e.name.endswith("in_proj.weight"))
    source = RandomWeights(architecture, seed=1)
    shards = [entry.rule.merge(read_parts(source, entry, shapes, rank, ranks)) for rank in range(ranks)]
    qkv, z, b, a = (source.read(name) for name in entry.hf_names)
    query, key, value = qkv.split([net.keys, net.keys, net.values])
    for rank, shard in enumerate(shards):
        # The order of Megatron's GatedDeltaNet: query, key, value, z, beta, alpha.
        expected = torch.cat([part.chunk(ranks)[rank] for part in (query, key, value, z, b, a)])
        assert torch.equal(shard, expected)
    assert all(torch.equal(x, y) for x, y in zip(entry.rule.join(shards), (qkv, z, b, a), strict=True))
    assert spans(entry.rule, 0, net.convolved, ranks - 1, ranks)[-1][1] == net.convolved


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(tp=2, pp=2)])
def test_a_table_of_shards_has_every_number_once_where_loading_puts_it(tiny_model, layout):
    architecture = read_architecture(tiny_model("qwen3.5"))
    shapes, source = hf_shapes(architecture), RandomWeights(architecture, seed=1)
    table = shard_table(architecture, layout)
    for number, name in enumerate(table.tensors):
        whole, left = source.read(name).flatten(1) if len(shapes[name]) > 1 else source.read(name)[:, None], 0
        for shard in table.shards[table.starts[number] : table.starts[number + 1]]:
            entry = table.parameters[shard["parameter"]]
            ranks = holders(entry, layout)
            rank = next(i for i, first in enumerate(ranks) if first in table.holdings[shard["holding"]])
            local = entry.rule.merge(read_parts(source, entry, shapes, rank, len(ranks)))
            local = local.flatten(1) if local.dim() > 1 else local[:, None]
            rows = local[shard["local_row"] : shard["local_row"] + shard["rows"]]
            columns = slice(shard["column"], shard["column"] + shard["columns"])
            assert torch.equal(rows, whole[shard["row"] : shard["row"] + shard["rows"], columns]), name
            assert local.shape[1] == table.widths[shard["parameter"]]
            left += rows.numel()
        assert left == whole.numel(), name


def test_the_sections_have_megatron_s_names_in_its_files(tiny_model):
    table = {s.key: s for s in stored_parameters(read_architecture(tiny_model("qwen3.5")))}
    prefix = "decoder.layers.0.self_attention."
    tensors = [(t.key.removeprefix(prefix), t.shape) for t in table[f"{prefix}in_proj.weight"].tensors]
    assert tensors == [
        ("in_proj.weight.query", (32, 64)),
        ("in_proj.weight.key", (32, 64)),
        ("in_proj.weight.value", (96, 64)),
        ("in_proj.weight.z", (96, 64)),
        ("in_proj.weight.beta", (4, 64)),
        ("in_proj.weight.alpha", (4, 64)),
    ]
    assert [t.shape for t in table[f"{prefix}conv1d.weight"].tensors] == [(32, 1, 4), (32, 1, 4), (96, 1, 4)]


def test_fresh_weights_make_every_norm_multiply_by_one(tiny_model):
    architecture = read_architecture(tiny_model("qwen3.5"))
    source = RandomWeights(architecture, seed=0)
    for name in hf_shapes(architecture):
        if name.endswith("norm.weight"):
            wanted = 1.0 if name.endswith("linear_attn.norm.weight") else 0.0
            assert (source.read(name) == wanted).all(), name
    rates = source.read("model.layers.0.linear_attn.A_log").exp()
    assert rates.min() > 0 and rates.max() <= 16.01
    assert (source.read("model.layers.0.linear_attn.dt_bias") == 1).all()


def test_vision_tower_and_prediction_layers_are_known_and_nothing_else(tiny_model, tmp_path):
    model = write_tiny_vision_model(tmp_path, tiny_model("qwen3.5"))
    architecture = read_architecture(model)
    with Safetensors(model, architecture):
        extra = left_out_tensors(model, architecture)
    names = {name for name in load_file(model / "model.safetensors") if name.startswith(("model.visual.", "mtp."))}
    assert extra.keys() == names and len(names) > 10


def test_attention_and_memory_of_three_in_four_layers_do_not_grow_with_the_sequence():
    found = read_architecture(PUBLISHED)
    net, full = found.delta_net, found.of_layer(3)
    # Equations of the paper for one value head, keys and values of 128, chunks of 64; four taps of 10,240 channels.
    of_net = 48 * (6 * 128 * 128 + 64 * 5 * 128) + 2 * 4 * 10240
    assert attention_flops(found.of_layer(0), 5000.0) == of_net
    # The mean token of a full layer sees one more of each two that a sequence is longer.
    assert model_flops(found, 8001.0, False) - model_flops(found, 8000.0, False) == pytest.approx(16 * 2 * 24 * 256)
    assert model_flops(found, 8000.0, False) - model_flops(found, 4000.0, False) == pytest.approx(
        16 * (attention_flops(full, 8000.0) - attention_flops(full, 4000.0))
    )
    assert kv_bytes_per_token(found, tp=1) == 2 * 16 * 4 * 256 * 2
    assert state_bytes(found) == 48 * (48 * 128 * 128 * 4 + 3 * 10240 * 2)
    assert net.projected == 2 * 2048 + 2 * 6144 + 2 * 48
