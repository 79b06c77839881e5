"""A model without a tokenizer, or with a damaged one, is refused with a sentence."""

import shutil
from pathlib import Path

import pytest

from exprl_megatron.errors import UserError
from exprl_megatron.models.tokenizer import load_tokenizer

MINIATURE = Path(__file__).parents[2] / "recipes" / "miniature" / "policy"


@pytest.fixture
def model(tmp_path):
    """A copy of the miniature without its weights."""
    return Path(shutil.copytree(MINIATURE, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")))


def test_a_tokenizer_is_loaded(model):
    assert len(load_tokenizer(model)) > 10


@pytest.mark.parametrize("left", [["config.json"], ["config.json", "tokenizer_config.json", "chat_template.jinja"], []])
def test_a_model_without_a_tokenizer_is_refused(model, left):
    for path in model.iterdir():
        if path.name not in left:
            path.unlink()
    with pytest.raises(UserError, match=r"There is no tokenizer in .*model: .* copy tokenizer\.json, tokenizer_config"):
        load_tokenizer(model)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", ""),
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n"),
        ("tokenizer_config.json", "{"),
    ],
)
def test_a_damaged_tokenizer_is_refused_with_its_fault(model, name, content):
    (model / name).write_text(content)
    with pytest.raises(UserError, match=r"The tokenizer in .*model cannot be read \(.+: .+\); replace") as raised:
        load_tokenizer(model)
    assert "\n" not in str(raised.value)


def test_a_model_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"The tokenizer in .*nowhere cannot be read"):
        load_tokenizer(tmp_path / "nowhere")
