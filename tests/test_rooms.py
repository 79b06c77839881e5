"""Packages import in one direction: each package imports only those before it in ORDER, lazily or not."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "exprl_megatron"
ORDER = (
    "errors",
    "version",
    "utils",
    "config",
    "plugins",
    "models",
    "problems",
    "reporting",
    "processes",
    "judging",
    "rewards",
    "serving",
    "rollout",
    "runs",
    "algorithms",
    "api",
    "policy",
    "conversion",
    "weight_sync",
    "planning",
    "evaluation",
    "training",
    "launch",
    "inspection",
    "commands",
    "cli",
)
"""From the ground up, as in README.md's table of the packages."""
CPU_BACKEND = PACKAGE / "serving" / "cpu_backend"
"""Modules under the names of packages that they replace inside SGLang's servers."""


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name without the package's, `serving.client`."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name and CPU_BACKEND not in path.parents:
            found[name] = path
    return found


def imported(path: Path) -> set[str]:
    """The package's modules or names that a file imports: at its top, inside functions and for types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports by a relative name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    prefix = f"{PACKAGE.name}."
    return {name.removeprefix(prefix) for name in found if name.startswith(prefix)}


def package(name: str) -> str:
    return name.partition(".")[0]


def test_every_package_has_a_place_in_the_order():
    assert {package(name) for name in modules()} == set(ORDER)


def test_no_package_imports_one_that_comes_after_it():
    place = {name: index for index, name in enumerate(ORDER)}
    up = sorted(
        f"{name} imports {other}"
        for name, path in modules().items()
        for other in imported(path)
        if package(other) in place and place[package(other)] > place[package(name)]
    )
    assert up == []


def test_no_two_modules_have_the_same_name():
    # A config module may have the name of what it configures.
    names = Counter(
        name.rpartition(".")[2]
        for name, path in modules().items()
        if path.name != "__init__.py" and package(name) != "config"
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_no_two_test_files_have_the_same_name():
    # pytest imports them by name alone, and collects nothing where two have the same one.
    names = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_the_readme_lists_the_packages_in_their_order():
    text = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?`) \| ", text[text.index("| `exprl_megatron/` |") :], re.MULTILINE)[1:]
    listed = [name for row in rows for name in re.findall(r"`(\w+)(?:/|\.py)`", row)]
    assert listed == list(ORDER)


def test_what_a_model_is_can_be_imported_without_torch():
    names = [f"{PACKAGE.name}.{name}" for name in modules() if package(name) == "models"]
    code = f"import sys, {', '.join(names)}; print('torch' in sys.modules, 'megatron' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_tokenizers_are_loaded_in_one_place():
    loading = [name for name, path in modules().items() if "AutoTokenizer" in path.read_text(encoding="utf-8")]
    assert loading == ["models.tokenizer"]
