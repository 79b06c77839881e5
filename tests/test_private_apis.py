"""docs/private_apis.md lists the private names of torch, Megatron and SGLang that the code uses, and each exists."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/private_apis.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `([\w.]+):([\w.]+)` \| (.+?) \| (.+?) \|$", PAGE, re.M)
PACKAGES = ("torch", "megatron", "sglang")
CODE = [path for room in ("exprl_megatron", "recipes", "tools") for path in sorted((ROOT / room).rglob("*.py"))]


def private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def internal(module: str, name: str) -> bool:
    """Whether it has an underscore, or is one of SGLang's modules behind its command line."""
    if re.match(r"sglang\.srt(?!\.models)", module):
        return True
    return module.split(".")[0] in PACKAGES and private(f"{module}.{name}")


def imports(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name.rpartition(".")[::2] for alias in node.names)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"sglang\.srt(\.\w+)+", str(node.value)):
            yield node.value.rpartition(".")[::2]


def source(module: str) -> ast.Module | None:
    """The installed source of a module, found without an import of it or of its parents but the first."""
    top, *rest = module.split(".")
    for folder in importlib.util.find_spec(top).submodule_search_locations:
        path = Path(folder, *rest)
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return ast.parse(file.read_text(encoding="utf-8"))
    return None


def named(tree: ast.AST) -> set[str]:
    """Everything that is defined, assigned or imported anywhere in `tree`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.module and node.names[0].name == "*":
            found |= named(source(node.module) or ast.Module([], []))
        elif isinstance(node, ast.ImportFrom | ast.Import):
            found |= {(alias.asname or alias.name).split(".")[-1] for alias in node.names}
    return found


def test_every_internal_import_is_on_the_page():
    listed = {f"{module}.{name}" for module, name, *_ in ROWS}
    used = {
        f"{module}.{name}": path.name
        for path in CODE
        for module, name in imports(ast.parse(path.read_text(encoding="utf-8")))
        if internal(module, name)
    }
    unlisted = {name: file for name, file in used.items() if name not in listed}
    assert len(used) > 5
    assert unlisted == {}, "add these to docs/private_apis.md, with what an upgrade breaks"


@pytest.mark.parametrize(("module", "name", "file", "breaks"), ROWS, ids=lambda value: value[:60])
def test_a_listed_name_exists_and_is_used(module, name, file, breaks):
    tree = source(module)
    if tree is None:
        # The last part is a class of the module.
        tree = source(module.rpartition(".")[0])
    found = (tree is not None and name in named(tree)) or source(f"{module}.{name}") is not None
    assert found, f"{module} has no {name}: {breaks}"
    text = (ROOT / file.strip("`")).read_text(encoding="utf-8")
    assert name.split(".")[-1] in text


def test_the_page_is_of_the_pinned_versions():
    pins = dict(re.findall(r'"(torch|megatron-core|sglang)==([^"]+)"', (ROOT / "setup.py").read_text(encoding="utf-8")))
    assert dict(re.findall(r"(torch|megatron-core|sglang) ([\d.]+\d)", PAGE)) == pins
