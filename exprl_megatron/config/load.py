"""From a YAML file and `key.path=value` overrides to a checked RunConfig."""

import difflib
from pathlib import Path
from typing import Any, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from exprl_megatron.config.base import Config
from exprl_megatron.config.run import RunConfig
from exprl_megatron.errors import UserError


def load_config(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> RunConfig:
    """The run's config; relative paths in it are taken from the working directory.

    Raises UserError with one sentence for each violation, all of them at once.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no config file {path}; give the path of a YAML file.")
    try:
        tree = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}; mend that line.") from error
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise UserError(f"The override {override!r} has no value; write key.path=value.")
        try:
            value = OmegaConf.from_dotlist([f"value={override.partition('=')[2]}"])["value"]
            OmegaConf.update(tree, key, value, force_add=True)
        except (YAMLError, OmegaConfBaseException, ValueError, AttributeError) as error:
            raise UserError(f"The override {override!r} fits nowhere in {path}: {error}.") from error
    return check_config(OmegaConf.to_container(tree, resolve=True), str(path))


def check_config(tree: Any, origin: str) -> RunConfig:
    """`tree` (plain dicts and lists) as a RunConfig; see load_config for what it raises."""
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        sentences = [_sentence(item, tree) for item in error.errors()]
        raise UserError(_listing(origin, sentences)) from error
    sentences = list(_violations(config, config))
    if sentences:
        raise UserError(_listing(origin, sentences))
    return config


def _violations(piece: Config, whole: RunConfig):
    yield from piece.violations(whole)
    for name in type(piece).model_fields:
        value = getattr(piece, name)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Config):
                yield from _violations(item, whole)


def _listing(origin: str, sentences: list[str]) -> str:
    return "\n".join(f"{origin}: {sentence}" for sentence in sentences)


def _sentence(item: dict, tree: Any) -> str:
    """One pydantic finding as a sentence with key, value and remedy."""
    path = _path(item["loc"], tree)
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(item["loc"][-1]), _known(item["loc"][:-1]), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "remove it."
        return f"unknown key {path}; {hint}"
    if item["type"] == "missing":
        return f"{path} is missing; set it."
    if item["type"].startswith("union_tag"):
        return f"{path}: {item['msg']}; set `kind` to one of the known stages."
    return f"{path} is {item['input']!r}: {_lower(item['msg'])}; change the value."


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:].rstrip(".")


def _path(loc: tuple, tree: Any) -> str:
    """The key path as the user wrote it: pydantic adds the chosen stage kind, which no YAML has."""
    shown = []
    for part in loc:
        if isinstance(tree, dict) and part not in tree and tree.get("kind") == part:
            continue
        shown.append(str(part))
        if isinstance(tree, dict):
            tree = tree.get(part)
        elif isinstance(tree, list) and isinstance(part, int) and part < len(tree):
            tree = tree[part]
    return ".".join(shown)


def _known(loc: tuple) -> list[str]:
    """Names of the fields of the config class at `loc`."""
    classes: list[type[BaseModel]] = [RunConfig]
    for part in loc:
        if isinstance(part, int):
            continue
        named = [c for c in classes if part in c.model_fields]
        if named:
            classes = [k for c in named for k in _classes(c.model_fields[part].annotation)]
        else:
            classes = [c for c in classes if part in get_args(c.model_fields["kind"].annotation)] or classes
    return [name for c in classes for name in c.model_fields]


def _classes(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [k for inner in get_args(annotation) for k in _classes(inner)]
