"""A run's config as plain dicts and lists, and as the NeMo-Run configs that the command line and Python override."""

from pathlib import Path
from typing import Any

import nemo_run as run
import yaml
from omegaconf import OmegaConf

from exprl_megatron.config.load import check_config, load_config
from exprl_megatron.config.run import RunConfig

CONFIGS = Path(__file__).parent / "configs"
_WORDS = {"true": True, "false": False, "null": None}
"""What YAML, and not NeMo-Run's command line, takes for other than a text."""


def written(name: str, *overrides: str) -> dict:
    """Return the run of `configs/NAME.yaml` under `key.path=value` overrides, with every default filled in."""
    return load_config(CONFIGS / f"{name}.yaml", overrides).model_dump(mode="json")


def changed(tree: dict, **changes: Any) -> dict:
    """`tree` with `changes` laid over it: dicts key by key, everything else as a whole."""
    return OmegaConf.to_container(OmegaConf.merge(tree, changes))


def as_config(tree: dict, origin: str) -> run.Config[dict]:
    """`tree` with every default filled in, for NeMo-Run; every key of it can be set.

    Raises UserError, naming `origin`, where the tree is not the config of a run.
    """
    return _wrapped(check_config(tree, origin).model_dump(mode="json"))


def as_run_config(tree: Any, origin: str) -> RunConfig:
    """Return the checked config of a tree, or of what `as_config` made of one.

    Raises UserError, naming `origin`, with a sentence for everything that is wrong with it.
    """
    return check_config(_plain(tree), origin)


def as_yaml(config: RunConfig) -> str:
    """Return the file that `exprl train` reads."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _wrapped(value: Any) -> Any:
    if isinstance(value, dict):
        return run.Config(dict, **{key: _wrapped(item) for key, item in value.items()})
    return [_wrapped(item) for item in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    if isinstance(value, run.Config):
        value = dict(value.__arguments__)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return _WORDS.get(value, value) if isinstance(value, str) else value
