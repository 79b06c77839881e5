"""docs/private_apis.md lists the private and the replaced names of other packages that the code uses; each exists."""

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/private_apis.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `([\w.]+):([\w.]+)` \| `(.+?)` \| (.+?) \|$", PAGE, re.M)
PACKAGES = ("torch", "megatron", "sglang", "transformers", "nemo_run", "transformer_engine")
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
        elif isinstance(node, ast.Assign) and is_call(node.value, "importlib.import_module", "import_module"):
            found |= {ast.unparse(target) for target in node.targets}
    return found


def is_call(node: ast.AST, *functions: str) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) in functions


def own_attributes(tree: ast.Module) -> set[str]:
    """What is assigned on `self` in a file."""
    stored = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store))
    return {node.attr for node in stored if ast.unparse(node.value) == "self"}


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
    """Attributes of other packages' objects that are private, or that are replaced.

    A private attribute is of another package where nothing of ours defines it, or where it is assigned on an object
    that is not `self` and this file does not define it. It is replaced by an assignment, or by `setattr`.
    """
    found, foreign, attributes_here = set(), foreign_names(tree), own_attributes(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root = ast.unparse(node.value).split(".")[0]
            stored = isinstance(node.ctx, ast.Store | ast.Del) and root not in ("self", "cls")
            defined = attributes_here if stored else own
            if (stored and root in foreign) or (re.match(r"_[a-zA-Z]", node.attr) and node.attr not in defined):
                found.add(node.attr)
        elif is_call(node, "getattr", "hasattr", "setattr", "delattr") and isinstance(node.args[1], ast.Constant):
            name, changed = node.args[1].value, node.func.id in ("setattr", "delattr")
            if (re.match(r"_[a-zA-Z]", name) and name not in own) or (changed and ast.unparse(node.args[0]) in foreign):
                found.add(name)
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
    listed = {(f"{module}.{name}", file) for module, name, file, _ in ROWS}
    used = {
        (f"{module}.{name}", path.relative_to(ROOT).as_posix())
        for path in CODE
        for module, name in imports(ast.parse(path.read_text(encoding="utf-8")))
        if internal(module, name)
    }
    assert len(used) > 5
    assert sorted(used - listed) == [], "add these to docs/private_apis.md, with what an upgrade breaks"


# What Python's own library documents for programs that replace it, and the view of torch that Megatron gets.
DOCUMENTED = {"_exit", "argv", "stdin", "stdout", "stderr", "__stdin__", "__stdout__", "__stderr__", "exit", "quit"}
DOCUMENTED |= {"unraisablehook", "tempdir", "setrlimit", "disabled", "torch"}
# Ours, switched off by a benchmark.
DOCUMENTED |= {"_have_loader"}
OF_EXAMPLES = ROOT / "tools" / "problem_sets"
"""Generates problems with a package that only a maintainer runs."""


def test_every_private_or_replaced_attribute_is_on_the_page():
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in CODE if OF_EXAMPLES not in path.parents}
    own, listed = own_names(list(trees.values())), {(name.split(".")[-1], file) for _, name, file, _ in ROWS}
    found = {
        (name, path.relative_to(ROOT).as_posix())
        for path, tree in trees.items()
        for name in borrowed_attributes(tree, own) - DOCUMENTED
    }
    assert {"_cdata", "dist_all_gather_func", "type"} <= {name for name, _ in found}
    assert sorted(found - listed) == [], "add these to docs/private_apis.md, with what an upgrade breaks"


def is_attribute(module: str, name: str) -> bool:
    """Whether `module`, which may end in names of classes, has `name` when it is imported: for what is written in C."""
    if module.split(".")[0] == "megatron":
        return False
    top, *rest = module.split(".")
    found = importlib.import_module(top)
    for place, each in enumerate(rest, start=1):
        if not hasattr(found, each):
            importlib.import_module(".".join([top, *rest[:place]]))
        found = getattr(found, each)
    return hasattr(found, name)


@pytest.mark.parametrize(("module", "name", "file", "breaks"), ROWS, ids=lambda value: value[:60])
def test_a_listed_name_exists_and_is_used(module, name, file, breaks):
    text = (ROOT / file).read_text(encoding="utf-8")
    assert name.split(".")[-1] in text
    if importlib.util.find_spec(module.split(".")[0]) is None:
        pytest.skip(f"{module.split('.')[0]} is not part of this environment")
    tree = source(module)
    if tree is None and "." in module:
        # The last part is a class of the module.
        tree = source(module.rpartition(".")[0])
    found = (tree is not None and name in named(tree)) or source(f"{module}.{name}") is not None
    assert found or is_attribute(module, name), f"{module} has no {name}: {breaks}"


def test_the_page_is_of_the_pinned_versions():
    names = "torch|megatron-core|sglang|nemo-run|transformer-engine"
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    pins = dict(re.findall(rf'"({names})(?:\[[\w,]+\])?==([^"]+)"', setup))
    assert dict(re.findall(rf"\b({names}) ([\d.]+\d)", PAGE)) == pins
