"""docs/private_apis.md lists the private and the replaced names of other packages that the code uses; each exists."""

import ast
import importlib
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


def foreign_names(tree: ast.AST) -> set[str]:
    """What a file imports from other packages, and `module`, a module of Megatron that is adapted after its import."""
    found = {"module"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("exprl_megatron"):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def own_names(trees: list[ast.Module]) -> set[str]:
    """Every function, class, variable and attribute of `self` that the code defines."""
    found = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            found.add(node.attr)
    return found


def borrowed_attributes(tree: ast.Module, own: set[str]) -> set[str]:
    """Private attributes that nothing of ours defines, and attributes of imported names that are assigned."""
    found, foreign = set(), foreign_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root = ast.unparse(node.value).split(".")[0]
            replaced = isinstance(node.ctx, ast.Store) and root in foreign
            if replaced or (re.match(r"_[a-zA-Z]", node.attr) and node.attr not in own):
                found.add(node.attr)
    return found


def source(module: str) -> ast.Module | None:
    """The installed source of a module, found without an import of it or of its parents but the first."""
    top, *rest = module.split(".")
    package = importlib.util.find_spec(top)
    for folder in (package.submodule_search_locations if package is not None else None) or ():
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


# What Python's own library documents for programs that replace it, and the view of torch that Megatron gets.
DOCUMENTED = {"_exit", "argv", "stdin", "stdout", "stderr", "__stdin__", "__stdout__", "__stderr__", "exit", "quit"}
DOCUMENTED |= {"unraisablehook", "tempdir", "setrlimit", "disabled", "torch"}
OF_EXAMPLES = ROOT / "tools" / "problem_sets"
"""Generates problems with a package that only a maintainer runs."""


def test_every_private_or_replaced_attribute_is_on_the_page():
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in CODE if OF_EXAMPLES not in path.parents}
    own, listed = own_names(list(trees.values())), {name.split(".")[-1] for _, name, *_ in ROWS}
    found = {path.name: borrowed_attributes(tree, own) - DOCUMENTED for path, tree in trees.items()}
    assert {"_cdata", "dist_all_gather_func", "type"} <= set().union(*found.values())
    unlisted = {file: names - listed for file, names in found.items() if names - listed}
    assert unlisted == {}, "add these to docs/private_apis.md, with what an upgrade breaks"


def is_attribute(module: str, name: str) -> bool:
    """Whether an import of `module`, or of what is before its last name, has `name`: for what is written in C."""
    if module.split(".")[0] == "megatron":
        return False
    try:
        return hasattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        parent, _, owner = module.rpartition(".")
        return hasattr(getattr(importlib.import_module(parent), owner, None), name)


@pytest.mark.parametrize(("module", "name", "file", "breaks"), ROWS, ids=lambda value: value[:60])
def test_a_listed_name_exists_and_is_used(module, name, file, breaks):
    tree = source(module)
    if tree is None and "." in module:
        # The last part is a class of the module.
        tree = source(module.rpartition(".")[0])
    found = (tree is not None and name in named(tree)) or source(f"{module}.{name}") is not None
    assert found or is_attribute(module, name), f"{module} has no {name}: {breaks}"
    text = (ROOT / file.strip("`")).read_text(encoding="utf-8")
    assert name.split(".")[-1] in text


def test_the_page_is_of_the_pinned_versions():
    pins = dict(re.findall(r'"(torch|megatron-core|sglang)==([^"]+)"', (ROOT / "setup.py").read_text(encoding="utf-8")))
    assert dict(re.findall(r"(torch|megatron-core|sglang) ([\d.]+\d)", PAGE)) == pins
