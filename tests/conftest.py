"""Fixtures shared by all tests: tiny models, and one running server."""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_models import write_tiny_model

from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.serving.launch import Server, ServerSpec, start_servers


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model("qwen3", tied=True)`: the directory of such a model, written once (see write_tiny_model).

    Tests must not write into it.
    """
    written: dict[str, Path] = {}

    def get(architecture: str, **settings) -> Path:
        bound = inspect.signature(write_tiny_model).bind(Path(), architecture, **settings)
        bound.apply_defaults()
        key = "-".join(str(value) for value in list(bound.arguments.values())[1:])
        if key not in written:
            written[key] = write_tiny_model(tmp_path_factory.mktemp(architecture), architecture, **settings)
        return written[key]

    return get


@pytest.fixture(scope="session")
def qwen3_server(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A policy server with the default tiny Qwen3, for all tests that leave it as they found it."""
    spec = ServerSpec(
        name="policy-0", model=tiny_model("qwen3"), config=ServerConfig(), log_dir=tmp_path_factory.mktemp("logs")
    )
    with start_servers([spec])[0] as server:
        yield server
