"""Model directories in and out, in a world of one process; layouts are the matter of tests/policy."""

import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from helpers.worlds import alone
from safetensors.torch import load_file, save_file

from exprl_megatron.config.policy import Layout, PolicyConfig
from exprl_megatron.errors import UserError
from exprl_megatron.models.architecture import read_architecture
from exprl_megatron.models.name_map import parameters
from exprl_megatron.models.weight_readers import RandomWeights, read_parts
from exprl_megatron.policy.gather import bucket_plan, gather_buckets
from exprl_megatron.policy.huggingface import initialize, load_huggingface, save_huggingface
from exprl_megatron.policy.model import build_chunks


@pytest.fixture(scope="module")
def world() -> Iterator:
    with alone() as entered:
        yield entered


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_model("qwen3"), tmp_path / "model"))


def load(directory: Path, world):
    architecture = read_architecture(directory)
    chunks = build_chunks(architecture, PolicyConfig(model=str(directory)), world)
    load_huggingface(chunks, architecture, world, directory)
    return chunks, architecture


def change(directory: Path, **changes) -> None:
    """Rewrites the weights with some tensors replaced, or left out where None."""
    path = directory / "model.safetensors"
    tensors = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    tensors = {k: v for k, v in (load_file(path) | tensors).items() if v is not None}
    save_file(tensors, path, metadata={"format": "pt"})


def test_weights_in_several_files_are_read_and_written_alike(model, world, tmp_path):
    tensors = load_file(model / "model.safetensors")
    chunks, architecture = load(model, world)
    save_huggingface(chunks, architecture, world, model, tmp_path / "out", shard_bytes=30_000)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    again, _ = load(tmp_path / "out", world)
    for ours, theirs in zip(again[0].parameters(), chunks[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<|end|>"


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral"])
def test_experts_come_out_bit_equal_to_what_went_in(tiny_model, world, tmp_path, family):
    directory = tiny_model(family)
    chunks, architecture = load(directory, world)
    save_huggingface(chunks, architecture, world, directory, tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (directory, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_buckets_hold_every_tensor_once_and_keep_to_their_size(model, world):
    chunks, architecture = load(model, world)
    buckets = list(gather_buckets(chunks, architecture, world, bucket_bytes=50_000))
    assert len(buckets) > 3
    assert all(sum(tensor.nbytes for _, tensor in bucket) <= 50_000 for bucket in buckets)
    gathered = dict(pair for bucket in buckets for pair in bucket)
    expected = load_file(model / "model.safetensors")
    assert gathered.keys() == expected.keys()
    assert all(torch.equal(gathered[name], expected[name]) for name in expected)
    gathered["model.norm.weight"].zero_()
    assert chunks[0].decoder.final_layernorm.weight.abs().sum() > 0


def test_a_tensor_larger_than_a_bucket_has_one_of_its_own(model):
    plan = bucket_plan(read_architecture(model), Layout(), itemsize=4, bucket_bytes=1)
    assert all(len(bucket) == 1 for bucket in plan)


def test_values_are_converted_to_the_policys_precision(model, world):
    architecture = read_architecture(model)
    chunks = build_chunks(architecture, PolicyConfig(model=str(model), precision="bf16"), world)
    load_huggingface(chunks, architecture, world, model)
    expected = load_file(model / "model.safetensors")["model.norm.weight"].bfloat16()
    assert torch.equal(chunks[0].decoder.final_layernorm.weight, expected)


def test_a_directory_without_weights_is_refused(model, world):
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no safetensors weights"):
        load(model, world)


@pytest.mark.parametrize("left", [5, 400, 20_000])
def test_a_truncated_file_is_refused(model, world, left):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(UserError, match=r"model\.safetensors is truncated or damaged"):
        load(model, world)


def test_an_index_that_names_a_file_that_is_not_there_is_refused(model, world):
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"lacks model-00001-of-00002\.safetensors"):
        load(model, world)


def test_an_index_that_is_none_is_refused(model, world):
    (model / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(UserError, match="is not a safetensors index"):
        load(model, world)


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("model__norm__weight", None, "lacks tensor model.norm.weight"),
        ("model__extra", torch.zeros(2), "has the unknown tensor model.extra"),
        ("model__norm__weight", torch.zeros(63), r"model.norm.weight has shape \(63,\), config.json says \(64,\)"),
    ],
)
def test_every_tensor_is_accounted_for(model, world, name, tensor, said):
    change(model, **{name: tensor})
    with pytest.raises(UserError, match=said):
        load(model, world)


def test_a_tied_output_layer_may_be_stored_twice_but_not_differently(tiny_model, world, tmp_path):
    model = Path(shutil.copytree(tiny_model("llama", tied=True), tmp_path / "model"))
    embedding = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    change(model, lm_head__weight=embedding.clone())
    load(model, world)
    change(model, lm_head__weight=embedding + 1)
    with pytest.raises(UserError, match="set tie_word_embeddings to false"):
        load(model, world)


def test_an_existing_directory_is_not_overwritten(model, world):
    chunks, architecture = load(model, world)
    before = sorted(path.name for path in model.parent.rglob("*"))
    with pytest.raises(UserError, match="it exists already"):
        save_huggingface(chunks, architecture, world, model, model)
    assert sorted(path.name for path in model.parent.rglob("*")) == before


def test_a_full_disk_leaves_nothing_behind(model, world, tmp_path):
    chunks, architecture = load(model, world)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot be written to .*choose another place or make room"):
            save_huggingface(chunks, architecture, world, model, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob("out*"))


def test_random_weights_follow_the_architecture_and_the_seed(model, world):
    architecture = read_architecture(model)
    chunks = build_chunks(architecture, PolicyConfig(model=str(model)), world)
    initialize(chunks, architecture, world, seed=1)
    first = {name: tensor.clone() for name, tensor in chunks[0].named_parameters()}
    assert first["decoder.final_layernorm.weight"].unique().tolist() == [1.0]
    matrix = first["decoder.layers.0.mlp.linear_fc1.weight"].detach()
    assert float(matrix.std()) == pytest.approx(architecture.initializer_range, rel=0.05)
    initialize(chunks, architecture, world, seed=2)
    assert not torch.equal(chunks[0].embedding.word_embeddings.weight, first["embedding.word_embeddings.weight"])


def test_parts_of_a_padded_vocabulary_are_filled_with_zeros(model):
    architecture = read_architecture(model)
    source = RandomWeights(architecture, seed=0)
    name = "model.embed_tokens.weight"
    shapes = {name: (architecture.vocabulary, architecture.hidden)}
    table = parameters(architecture, Layout())
    parts = [read_parts(source, table[0], shapes, rank, 3)[0] for rank in range(3)]
    assert {tuple(part.shape) for part in parts} == {(43, 64)}
    joined = torch.cat(parts)
    assert torch.equal(joined[:128], source.read(name))
    assert joined[128:].abs().sum() == 0
