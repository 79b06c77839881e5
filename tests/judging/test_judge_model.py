"""What is read from a judge's directory: its context, and which model it is."""

import json
import os
import shutil

import pytest

from exprl_megatron.errors import UserError
from exprl_megatron.judging.judge_model import model_context, model_identity

BIG = 80 * 2**20


@pytest.fixture
def model(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"weights")
    return directory


def _identity(directory):
    model_identity.cache_clear()
    return model_identity(str(directory))


def test_the_context_is_read_from_the_models_config(model, tmp_path):
    assert model_context(str(model)) == 512
    with pytest.raises(UserError, match="context length"):
        model_context(str(tmp_path / "nowhere"))


def test_a_copy_of_a_model_is_the_same_model(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "copy")
    os.utime(copy / "model.safetensors", (1, 1))
    (copy / "README.md").write_text("a copy")
    assert _identity(copy) == _identity(model)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_another_content_is_another_model(model, file):
    before = _identity(model)
    (model / file).write_bytes((model / file).read_bytes() + b" ")
    assert _identity(model) != before


def test_large_weights_are_distinguished_by_head_size_and_samples(model):
    def written(head, last, size=BIG):
        with open(model / "model.safetensors", "wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            file.truncate(size)
            file.seek(size - 1)
            file.write(last)
        return _identity(model)

    first = written(b'{"a": 1}', b"x")
    assert written(b'{"a": 1}', b"x") == first
    others = [written(b'{"b": 1}', b"x"), written(b'{"a": 1}', b"y"), written(b'{"a": 1}', b"x", BIG + 1)]
    assert len({first, *others}) == 4
