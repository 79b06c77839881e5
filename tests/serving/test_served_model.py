"""Model directories that no server should start with: each is refused with one sentence before anything starts."""

import json
import shutil

import pytest
from helpers.tiny_models import write_tiny_vision_model
from safetensors.torch import load_file, save_file

from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.errors import UserError
from exprl_megatron.models.left_out import LEFT_OUT
from exprl_megatron.models.weight_readers import INDEX, SINGLE
from exprl_megatron.serving.served_model import check_served_model
from exprl_megatron.serving.server_spec import check_servers, server_specs

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def model(tiny_model, tmp_path):
    return shutil.copytree(tiny_model("qwen3"), tmp_path / "model")


def check(directory, tp=1, cuda=False, extra_args=()):
    check_served_model(directory, "judge-0", ServerConfig(tp=tp, extra_args=extra_args), cuda)


def shard(model, *, index: bool) -> None:
    """Write the weights as two files, with an index of them or without."""
    weights = load_file(model / SINGLE)
    (model / SINGLE).unlink()
    names = sorted(weights)
    parts = names[::2], names[1::2]
    for file, part in zip(SHARDS, parts, strict=True):
        save_file({name: weights[name] for name in part}, model / file)
    if index:
        found = {name: file for file, part in zip(SHARDS, parts, strict=True) for name in part}
        (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": found}))


def change(model, **settings) -> None:
    tree = json.loads((model / "config.json").read_text()) | settings
    (model / "config.json").write_text(json.dumps(tree))


def empty(model):
    for path in model.iterdir():
        path.unlink()


def left_out_alone(model):
    (model / SINGLE).rename(model / LEFT_OUT)


def truncate(model):
    path = model / SINGLE
    path.write_bytes(path.read_bytes()[:-5])


def cut_header(model):
    path = model / SINGLE
    path.write_bytes(path.read_bytes()[:40])


def lose_the_end_of_a_length(model):
    (model / SINGLE).write_bytes(b"abc")


def lengthen(model):
    path = model / SINGLE
    path.write_bytes(path.read_bytes() + b"x")


def spoil_header(model):
    path = model / SINGLE
    data = path.read_bytes()
    path.write_bytes(data[:8] + b"[" + data[9:])


def lose_an_indexed_shard(model):
    shard(model, index=True)
    (model / SHARDS[1]).unlink()


def lose_a_shard(model):
    shard(model, index=False)
    (model / SHARDS[0]).unlink()


def lose_an_indexed_tensor(model):
    shard(model, index=True)
    kept = dict(sorted(load_file(model / SHARDS[0]).items())[1:])
    save_file(kept, model / SHARDS[0])


def lose_a_tensor(model):
    save_file(
        {name: tensor for name, tensor in load_file(model / SINGLE).items() if ".1.mlp." not in name}, model / SINGLE
    )


def lose_all_tensors(model):
    save_file({}, model / SINGLE)


def lose_tokenizer(model):
    for path in model.glob("tokenizer*"):
        path.unlink()


def spoil_config(model):
    (model / "config.json").write_text('{"architectures": ')


def spoil_index(model):
    shard(model, index=True)
    (model / INDEX).write_text('{"weight_map": 3}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (empty, r"model of judge-0, has no config\.json; give a directory"),
        (lambda model: (model / SINGLE).unlink(), r"has no \*\.safetensors; put the weights there"),
        (left_out_alone, r"has no weights: left-out\.safetensors is what a policy has no use for; export the model"),
        (truncate, r"model\.safetensors is truncated or damaged .*; fetch the model again"),
        (cut_header, r"model\.safetensors is truncated or damaged .*; fetch the model again"),
        (
            lose_an_indexed_shard,
            r"lacks model-00002-of-00002\.safetensors, which model\.safetensors\.index\.json names",
        ),
        (lose_a_shard, r"model of judge-0, lacks model-00001-of-00002\.safetensors; fetch"),
        (
            lose_an_indexed_tensor,
            r"lacks tensor lm_head\.weight \(1 such\), which model\.safetensors\.index\.json names",
        ),
        (
            lose_a_tensor,
            r"lacks tensor model\.layers\.1\.mlp\.down_proj\.weight \(3 such\), which SGLang would serve as",
        ),
        (lose_all_tensors, r"has no tensor in its \*\.safetensors"),
        (
            lose_tokenizer,
            r"model of judge-0, has no tokenizer \(tokenizer\.json, tokenizer\.model, vocab\.json\); put it",
        ),
        (spoil_config, r"config\.json, of the model of judge-0, is no JSON object .*; fetch it again"),
        (spoil_index, r"model\.safetensors\.index\.json is not a safetensors index; fetch"),
    ],
)
def test_a_directory_that_no_server_could_start_with_is_refused(model, damage, message):
    check(model)
    damage(model)
    with pytest.raises(UserError, match=message):
        check(model)


@pytest.mark.parametrize("index", [True, False])
def test_several_files_are_a_model_with_an_index_or_without(model, index):
    shard(model, index=index)
    check(model)


def test_a_judge_may_be_of_any_family_or_quantized_and_have_its_tokenizer_elsewhere(model):
    lose_a_tensor(model)
    change(model, architectures=["DeepseekV3ForCausalLM"])
    check(model, tp=64)
    change(model, architectures=["Qwen3ForCausalLM"], quantization_config={"quant_method": "awq"})
    check(model)
    lose_tokenizer(model)
    check(model, extra_args=("--tokenizer-path", "/elsewhere"))


def test_a_model_in_fp8_is_served_on_cuda_alone(model):
    change(model, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    check(model, cuda=True)
    with pytest.raises(
        UserError, match="model of judge-0, is quantized in fp8, which servers on a machine without GPUs"
    ):
        check(model)


def test_a_published_mixture_with_vision_and_its_experts_in_one_tensor_is_a_whole_model(tiny_model, tmp_path):
    check(write_tiny_vision_model(tmp_path, tiny_model("qwen3.5-moe")))


@pytest.mark.parametrize(
    ("family", "tp", "cuda", "fault"),
    [
        # On a CPU SGLang pads attention's heads: right but where a family reckons with their number.
        ("qwen3", 3, False, None),
        ("qwen3", 4, False, None),
        ("mixtral", 2, False, None),
        (
            "mixtral",
            4,
            False,
            "does not divide the 2 KV groups of .* mixtral model on a CPU otherwise; use a divisor of 2",
        ),
        ("olmo3", 4, False, "does not divide the 2 KV groups of .* olmo3 model on a CPU otherwise; use a divisor of 2"),
        ("qwen3.5", 4, False, "does not divide the 2 key heads of the gated delta nets of .*; use a divisor of 2"),
        # On CUDA it divides equally, and ranks share KV heads.
        ("mixtral", 4, True, None),
        ("qwen3", 4, True, None),
        ("olmo3", 4, True, "does not divide the 2 KV groups of .* olmo3 model otherwise; use a divisor of 2"),
        ("qwen3", 3, True, "neither divides the 2 KV groups of .* nor is a multiple of them; change it"),
        ("qwen3", 8, True, "does not divide the 4 attention heads of .*; use a divisor of 4"),
    ],
)
def test_ranks_that_sglang_cannot_divide_a_model_over_are_refused(tiny_model, family, tp, cuda, fault):
    if fault is None:
        return check(tiny_model(family), tp, cuda)
    with pytest.raises(UserError, match=f"^The tp of judge-0 is {tp}, which {fault}"):
        check(tiny_model(family), tp, cuda)


@pytest.mark.parametrize(
    ("family", "settings", "what"),
    [
        ("llama", {"intermediate_size": 98}, "98 MLP columns"),
        ("qwen3-moe", {"moe_intermediate_size": 50}, "50 columns of an expert"),
        ("qwen3.5-moe", {"shared_expert_intermediate_size": 42, "linear_num_key_heads": 4}, "42 columns of the shared"),
        ("mixtral", {"intermediate_size": 98}, "98 columns of an expert"),
    ],
)
def test_what_cuda_servers_divide_equally_is_looked_at(tiny_model, tmp_path, family, settings, what):
    model = shutil.copytree(tiny_model(family), tmp_path / "model")
    change(model, **settings)
    with pytest.raises(UserError, match=f"^The tp of judge-0 is 4, which does not divide the {what}"):
        check(model, 4, cuda=True)
    check(model, 4, cuda=True, extra_args=("--ep-size=4",))


def test_servers_of_one_model_are_looked_at_once(tiny_model, tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr("exprl_megatron.serving.server_spec.check_served_model", lambda *given: looked.append(given[1]))
    check_servers(server_specs("policy", tiny_model("qwen3"), ServerConfig(count=3), tmp_path))
    assert looked == ["policy-0"]
