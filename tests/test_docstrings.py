"""Public functions that raise an error say so in their docstrings (CONTRIBUTING.md, "Words")."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "exprl_megatron"
MISSING = {"cli": 5, "commands": 4}
"""Number of public functions of a package that may lack `Raises:`: commands, whose docstrings `--help` prints."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def public_functions(tree: ast.Module) -> Iterator[tuple[str, Function, str]]:
    """Yield public functions and methods of public classes with names and docstrings; `__init__` has its class's."""
    for node in tree.body:
        if isinstance(node, Function) and not node.name.startswith("_"):
            yield node.name, node, ast.get_docstring(node) or ""
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for member in node.body:
                if not isinstance(member, Function):
                    continue
                if member.name in ("__init__", "__post_init__"):
                    yield node.name, member, (ast.get_docstring(node) or "") + (ast.get_docstring(member) or "")
                elif not member.name.startswith("_"):
                    yield f"{node.name}.{member.name}", member, ast.get_docstring(member) or ""


def raises_new_error(function: Function) -> bool:
    """Whether the function's own body, without nested functions, raises an exception that it names."""
    waiting = list(ast.iter_child_nodes(function))
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Raise) and node.exc is not None and is_class(node.exc):
            return True
        if not isinstance(node, Function | ast.Lambda | ast.ClassDef):
            waiting.extend(ast.iter_child_nodes(node))
    return False


def is_class(raised: ast.expr) -> bool:
    """Whether a raised expression is an exception class or a call of one, by its capital letter."""
    named = raised.func if isinstance(raised, ast.Call) else raised
    name = named.id if isinstance(named, ast.Name) else named.attr if isinstance(named, ast.Attribute) else ""
    return name[:1].isupper()


def undocumented(source: str) -> list[str]:
    """Return the names of a module's public functions that raise errors without `Raises:` in their docstrings."""
    functions = public_functions(ast.parse(source))
    return [name for name, node, text in functions if raises_new_error(node) and "Raises:" not in text]


def found_by_package() -> dict[str, list[str]]:
    """Return the undocumented functions by package, or by module for modules directly in exprl_megatron."""
    found: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE)
        names = undocumented(path.read_text(encoding="utf-8"))
        found.setdefault(inside.parts[0].removesuffix(".py"), []).extend(f"{inside}: {name}" for name in names)
    return found


def test_public_functions_name_the_errors_that_they_raise():
    found = found_by_package()
    above = {package: names for package, names in found.items() if len(names) > MISSING.get(package, 0)}
    assert not above, "add `Raises:` with each error and its cause"


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("def load():\n    raise ValueError('no')", ["load"]),
        ("def load():\n    '''Load.\n\n    Raises:\n        ValueError: no.\n    '''\n    raise ValueError('no')", []),
        ("async def load():\n    if True:\n        raise errors.UserError", ["load"]),
        ("def _load():\n    raise ValueError('no')", []),
        ("def load():\n    try:\n        pass\n    except ValueError as error:\n        raise", []),
        ("def load(error):\n    raise error", []),
        ("def load():\n    def inner():\n        raise ValueError\n    return inner", []),
        ("class Store:\n    '''A store.'''\n    def __init__(self):\n        raise ValueError", ["Store"]),
        ("class Store:\n    '''Raises:\n    ValueError: no.'''\n    def __init__(self):\n        raise ValueError", []),
        ("class Store:\n    def load(self):\n        raise ValueError", ["Store.load"]),
        ("class _Store:\n    def load(self):\n        raise ValueError", []),
    ],
)
def test_a_public_function_that_raises_without_saying_so_is_found(source, names):
    assert undocumented(source) == names
