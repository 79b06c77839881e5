"""Writes the pages of docs/ that list what is in the code.

docs/config_keys.md has every config key with its type, default and description, read from the config classes;
docs/metrics.md has every metric, from metric_names.py.

    python tools/make_reference.py
"""

import argparse
import ast
import inspect
import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import metric_names
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from exprl_megatron.config.run import RunConfig
from exprl_megatron.errors import UserError

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, METRICS_PAGE = DOCS / "config_keys.md", DOCS / "metrics.md"
HEAD = """# Every config key

Written by `make reference` from the classes in `exprl_megatron/config/`; [config.md](config.md) explains how the keys
work together. Keys are read from one YAML file, and `a.b=value` after it sets any of them; `stages` is a list, so that
the keys of its first stage begin with `stages.0`. A key without a default must be set.
"""


@dataclass(frozen=True)
class Section:
    """A table of the page: the keys that a class itself defines, and the places in a config where they are set."""

    config: type[BaseModel]
    paths: tuple[str, ...]


def sections(root: type[BaseModel] = RunConfig) -> list[Section]:
    """Return every class that defines keys, parents before the classes that inherit from them, in the order of the
    config.
    """
    found: dict[type[BaseModel], list[str]] = {}

    def visit(config: type[BaseModel], path: str) -> None:
        for cls in reversed(config.__mro__):
            if issubclass(cls, BaseModel) and _own_fields(cls) and path not in found.setdefault(cls, []):
                found[cls].append(path)
        for name, field in config.model_fields.items():
            for below in _classes(field.annotation):
                visit(below, f"{path}.{'stages.N' if name == 'stages' else name}".strip("."))

    visit(root, "")
    return [Section(config, tuple(paths)) for config, paths in found.items()]


def _own_fields(config: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields that the class adds or changes."""
    own = inspect.get_annotations(config)
    return {name: field for name, field in config.model_fields.items() if name in own}


def _classes(annotation: Any) -> list[type[BaseModel]]:
    """Return the config classes that a field's annotation names, within unions and lists."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _classes(part)]


def descriptions(config: type[BaseModel]) -> dict[str, str]:
    """Return what each field that the class itself defines is for, in one line.

    That is the docstring below it, or below the field of a parent that it changes; of a section, the first line of the
    section's class.
    """
    said: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        if issubclass(cls, BaseModel) and cls is not BaseModel:
            said |= _docstrings(cls)
    for name, field in _own_fields(config).items():
        below = _classes(field.annotation)
        if name not in said and below:
            said[name] = " ".join((inspect.getdoc(below[0]) or "").split("\n\n")[0].split())
    return said


def _docstrings(config: type[BaseModel]) -> dict[str, str]:
    """Return the strings below the fields in the class's source."""
    found = {}
    [body] = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(body, ast.ClassDef)
    for statement, following in zip(body.body, body.body[1:], strict=False):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str() as text)):
                found[name] = " ".join(text.split())
    return found


def type_name(annotation: Any) -> str:
    """Return the type as a reader of YAML sees it: `int >= 1`, `"a" | "b"`, `list of text`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(arguments[0]) + _bounds(arguments[1:])
    if annotation is type(None):
        return "null"
    if origin in (Union, UnionType):
        return " | ".join(dict.fromkeys(type_name(part) for part in arguments))
    if origin is Literal:
        return " | ".join(f"`{value}`" for value in arguments)
    if origin in (list, tuple):
        return "list of " + " | ".join(dict.fromkeys(type_name(part) for part in arguments if part is not Ellipsis))
    if origin is not None:
        return f"mapping of {type_name(arguments[0])} to {type_name(arguments[1])}"
    names = {str: "text", bool: "true | false", float: "number", int: "integer"}
    return names.get(annotation) or ("section" if issubclass(annotation, BaseModel) else annotation.__name__)


def _bounds(metadata: Any) -> str:
    """Return the limits of a number: `> 0`, `>= 1`, `<= 1`."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = [
        f"{sign} {getattr(limit, name):g}"
        for limit in metadata
        for name, sign in signs.items()
        if getattr(limit, name, None) is not None
    ]
    return " " + ", ".join(found) if found else ""


def default_of(field: FieldInfo) -> str:
    """Return the default as YAML has it; of a section, nothing, as its keys have their own."""
    if field.is_required():
        return "must be set"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return ""
    return f"`{json.dumps(value, default=str)}`"


def table(section: Section) -> str:
    """Return a heading, what the class says of itself, where its keys are set, and a row for each."""
    said = descriptions(section.config)
    missing = [name for name in _own_fields(section.config) if name not in said]
    if missing:
        raise UserError(
            f"{section.config.__name__} does not describe {', '.join(missing)}: add a docstring below each."
        )
    where = ", ".join(f"`{path}`" for path in section.paths if path) or "the top level"
    rows = [
        f"| `{name}` | {_cell(type_name(field.annotation) + _bounds(field.metadata))} | {default_of(field)} "
        f"| {_cell(said[name])} |"
        for name, field in _own_fields(section.config).items()
    ]
    about = " ".join(inspect.getdoc(section.config).split())
    head = ["| key | type | default | |", "|---|---|---|---|"]
    return "\n".join([f"## {section.config.__name__}", "", f"At {where}. {about}", "", *head, *rows])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def page() -> str:
    """Return the whole page as Markdown."""
    return HEAD + "\n" + "\n\n".join(table(section) for section in sections()) + "\n"


def main() -> None:
    """Write both pages."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(page(), encoding="utf-8")
    METRICS_PAGE.write_text(metric_names.page(), encoding="utf-8")


if __name__ == "__main__":
    main()
