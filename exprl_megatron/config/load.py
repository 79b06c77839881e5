"""Loading of a RunConfig from a YAML file and `key.path=value` overrides, with all checks."""

import copy
import difflib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

from omegaconf import Container, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException
from omegaconf.resolvers import oc
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from yaml import MarkedYAMLError, YAMLError

from exprl_megatron.config.algorithms import expand_algorithms
from exprl_megatron.config.base import Config
from exprl_megatron.config.renamed import new_name, new_value
from exprl_megatron.config.reproduction import expand_reproduction
from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.shorthand import expand_shorthand
from exprl_megatron.config.stage_kinds import BUILT_IN, CUSTOM_TAG, Base, stage_tag, tag_of
from exprl_megatron.errors import UserError

_TO_REFER_TO = "x-"
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|(^|_)(KEY|PASS|AUTH|PAT)S?($|_)", re.IGNORECASE)

_OF_OMEGACONF = ("full_key:", "object_type=", "reference_type=")
_STAGE = re.compile(r"stages(?:\.(?P<stage>[^.\[]+)|\[(?P<place>[^\]]+)\])(?P<rest>(?:[.\[].*)?)")

ConfigCheck = Callable[[RunConfig], Iterable[str]]
"""Checks of a config whose values are valid each by itself: returns one sentence for each contradiction."""


def _nothing(config: RunConfig) -> Iterable[str]:
    return ()


def load_config(
    path: str | Path, overrides: tuple[str, ...] | list[str] = (), also: ConfigCheck = _nothing
) -> RunConfig:
    """Load the config of a run; its relative paths are relative to the working directory.

    `extends: FILE` puts the file over another one (its path is relative to the file); top-level keys that
    begin with `x-` are for `${x-...}` to refer to. Raises UserError with one sentence for each violation,
    all of them together; `also` checks what is outside of the config, such as its model.
    """
    return resolve_config(_loaded(Path(path)), overrides, path, also)


def resolve_config(
    tree: Container, overrides: tuple[str, ...] | list[str], path: str | Path, also: ConfigCheck = _nothing
) -> RunConfig:
    """Resolve `tree` under the overrides and check it; errors name `path` as its origin.

    Raises:
        UserError: as load_config.
    """
    for override in overrides:
        _override(tree, override, Path(path))
    try:
        resolved = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        if (own := _user_error_behind(error)) is not None:
            raise UserError(f"{path}: {own}") from error
        if isinstance(error, InterpolationKeyError) and (key := re.search(r"'(.+?)' not found", str(error))):
            raise UserError(f"{path} has no {key[1]}, to which a ${{{key[1]}}} refers; correct the name.") from error
        raise UserError(f"{path} refers to what it does not have: {_one_line(error)}; fix the ${{...}}.") from error
    if isinstance(resolved, dict):
        resolved = {key: value for key, value in resolved.items() if not str(key).startswith(_TO_REFER_TO)}
    return check_config(resolved, str(path), also)


def _environment_variable(name: str, *default: str | None) -> str | None:
    """Resolve OmegaConf's `oc.env`, except that a secret is not put where it would be printed and written to disk."""
    if _SECRET.search(name):
        raise UserError(
            f"${{oc.env:{name}}} would write a secret into the config of the run, where it shows; leave it in the "
            "environment (judge.api_key_variable names the variable with a judge's key)."
        )
    return oc.env(name, *default)


OmegaConf.register_resolver("oc.env", _environment_variable, replace=True)


def _loaded(path: Path, above: tuple[Path, ...] = ()) -> Container:
    """Return the file's tree over that of the file that it extends; `above` are the files that extend it."""
    if not path.is_file():
        raise UserError(f"There is no config file {path}; give the path of a YAML file.")
    if path.resolve() in above:
        raise UserError(f"{path} extends itself; take its `extends` out.")
    try:
        tree = OmegaConf.load(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 (byte {error.start}); give the path of a YAML file.") from error
    except (YAMLError, OmegaConfBaseException, OSError) as error:
        raise UserError(f"{path} is not YAML: {_fault(error)}; fix it.") from error
    if not isinstance(tree, DictConfig) or "extends" not in tree:
        return tree
    below = path.parent / str(tree.pop("extends"))
    return OmegaConf.merge(_loaded(below, (*above, path.resolve())), tree)


def _override(tree: Container, override: str, path: Path) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"The override {override!r} has no value; write key.path=value.")
    try:
        key = _numbered_stage(tree, key)
        _require_fit(tree, key)
    except LookupError as error:
        raise UserError(f"The override {override!r} fits nowhere in {path}: {error.args[0]}") from error
    try:
        read = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
        value = read["value"] if isinstance(read, dict) else None
        OmegaConf.update(tree, key, value, force_add=True)
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"The override {override!r} fits nowhere in {path}: {_one_line(error)}; fix it.") from error


def _numbered_stage(tree: Any, key: str) -> str:
    """Return `stages.NAME.rest` as `stages.N.rest`, and any other key as it is.

    Raises LookupError where `tree` has no such stage.
    """
    found = _STAGE.fullmatch(key)
    stages = tree.get("stages") if found and isinstance(tree, DictConfig) else None
    if found is None or not isinstance(stages, ListConfig):
        return key
    stage, rest = found["stage"] or found["place"], found["rest"]
    names = [_stage_name(stages, place) for place in range(len(stages))]
    if stage in names:
        return f"stages.{names.index(stage)}{rest}"
    if stage.isdigit() and int(stage) < len(names):
        return f"stages.{stage}{rest}"
    listed = ", ".join(f"{name} ({place})" for place, name in enumerate(names))
    raise LookupError(f"there is no stage {stage}; the stages are {listed}.")


def _stage_name(stages: ListConfig, place: int) -> str:
    listed = OmegaConf.to_container(stages)
    stage = listed[place] if isinstance(listed, list) else None
    return str(stage.get("name") or stage.get("kind")) if isinstance(stage, dict) else ""


def _require_fit(tree: Any, key: str) -> None:
    """Raise LookupError where the dotted `key` cannot be set, because a part of it is a value or outside of a list."""
    place, parts = OmegaConf.to_container(tree), [part for part in re.split(r"[.\[\]]", key) if part]
    for number, part in enumerate(parts):
        at = ".".join(parts[:number])
        if isinstance(place, list):
            if not part.isdigit() or int(part) >= len(place):
                raise LookupError(f"{at} is a list of {len(place)} and has no {part}; count from 0.")
            place = place[int(part)]
        elif isinstance(place, dict):
            place = place.get(part, place.get(int(part)) if part.isdigit() else None)
        elif place is None:
            return
        else:
            raise LookupError(f"{at} is {_shown(place)} and has no keys; set {at} itself.")


def check_config(tree: Any, origin: str, also: ConfigCheck = _nothing) -> RunConfig:
    """Return `tree` (plain dicts and lists) as a RunConfig.

    Raises:
        UserError: `tree` has unknown keys, invalid values or contradictions; the error lists all of them.
    """
    tree, sentences = expand_algorithms(expand_shorthand(tree))
    if not sentences:
        tree, sentences = expand_reproduction(tree)
    if sentences:
        raise UserError(_listing(origin, sentences))
    try:
        config = _validated(tree)
    except ValidationError as error:
        raise UserError(_listing(origin, _all_sentences(error, tree, also))) from error
    sentences = [*_violations(config, config), *also(config)]
    if sentences:
        raise UserError(_listing(origin, sentences))
    return config


def _validated(tree: Any) -> RunConfig:
    # As JSON, strictly: a list may become a tuple, but neither "3" nor true an integer.
    return RunConfig.model_validate_json(json.dumps(tree), strict=True)


def _all_sentences(error: ValidationError, tree: Any, also: ConfigCheck) -> list[str]:
    """Return what is wrong with keys and values, and, where only keys are unknown, the contradictions in the rest."""
    sentences = [_sentence(item, tree) for item in error.errors()]
    if any(item["type"] != "extra_forbidden" for item in error.errors()):
        return sentences
    rest = copy.deepcopy(tree)
    for item in error.errors():
        *parents, key = _keys(item["loc"], tree)
        place = rest
        for part in parents:
            place = place[part]
        del place[key]
    config = _validated(rest)
    return [*sentences, *_violations(config, config), *also(config)]


def _violations(piece: Config, run_config: RunConfig):
    yield from piece.violations(run_config)
    for name in type(piece).model_fields:
        value = getattr(piece, name)
        items = value if isinstance(value, tuple) else value.values() if isinstance(value, dict) else (value,)
        for item in items:
            if isinstance(item, Config):
                yield from _violations(item, run_config)


def _listing(origin: str, sentences: list[str]) -> str:
    return "\n".join(f"{origin}: {sentence}" for sentence in sentences)


def _sentence(item: ErrorDetails, tree: Any) -> str:
    """Return one pydantic finding as a sentence with key, value and remedy."""
    keys = _keys(item["loc"], tree)
    path = ".".join(map(str, keys))
    if item["type"] == "extra_forbidden":
        if (renamed := new_name(keys)) is not None:
            return f"{path} is now called {'.'.join(map(str, [*keys[:-1], renamed]))}; rename the key."
        near = difflib.get_close_matches(str(item["loc"][-1]), known_keys(item["loc"][:-1]), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "remove it."
        return f"unknown key {path}; {hint}"
    if item["type"] == "missing":
        return f"{path} is missing; set it."
    if item["type"].startswith("union_tag"):
        if _given(item).startswith(f"'{CUSTOM_TAG}"):
            return f"{path}.base is {item['input']['base']!r}; set it to one of {', '.join(get_args(Base))}."
        return f"{path}.kind is {_given(item)}; set it to one of {', '.join(_kinds())}, or to module:Class of your own."
    if not path:
        return "the config is not a mapping of keys to values; write key: value lines."
    if (renamed := new_value(keys, item["input"])) is not None:
        return f"{path} is {_shown(item['input'])}, which is now called {renamed!r}; change the value."
    return f"{path} is {_shown(item['input'])}: {_lower(item['msg'])}; change the value."


def _given(item: ErrorDetails) -> str:
    tag = item.get("ctx", {}).get("tag")
    return "missing" if tag is None else f"{tag!r}"


def _kinds() -> list[str]:
    """Return the built-in stages that a config may name."""
    return [str(tag_of(stage)) for stage in BUILT_IN]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _fault(error: Exception) -> str:
    """Return what is wrong with a YAML file, and in which line."""
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem or error.context}"
    return _one_line(error)


def _user_error_behind(error: BaseException | None) -> UserError | None:
    """Return the UserError that a resolver raised; OmegaConf wraps it and may cut the chain of causes."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def _one_line(error: Exception) -> str:
    """Return the error's message without the lines that OmegaConf adds about itself."""
    lines = str(error).splitlines()
    kept = [line for line in lines if not line.strip().startswith(_OF_OMEGACONF)]
    return " ".join(" ".join(kept or lines).split()).rstrip(".")


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:].rstrip(".")


def _keys(loc: tuple, tree: Any) -> list[str | int]:
    """Return the keys as the user wrote them: pydantic adds the tag of the chosen stage, which no YAML has."""
    keys = []
    for part in loc:
        if isinstance(tree, dict) and part not in tree and stage_tag(tree) == part:
            continue
        keys.append(part)
        if isinstance(tree, dict):
            tree = tree.get(part)
        elif isinstance(tree, list) and isinstance(part, int) and part < len(tree):
            tree = tree[part]
    return keys


def known_keys(loc: tuple[str | int, ...]) -> list[str]:
    """Return the keys that a config may have at `loc`; a number is a place in a list."""
    classes: list[type[BaseModel]] = [RunConfig]
    for part in loc:
        if isinstance(part, int):
            continue
        named = [c for c in classes if part in c.model_fields]
        if named:
            classes = [k for c in named for k in _classes(c.model_fields[part].annotation)]
        else:
            classes = [c for c in classes if part == tag_of(c)] or classes
    return [name for c in classes for name in c.model_fields]


def _classes(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [k for inner in get_args(annotation) for k in _classes(inner)]
