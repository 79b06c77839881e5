"""Names of packages and distributions: Python's own answer, and the processes that use the quick one."""

import ast
import importlib.metadata
from pathlib import Path

import pytest

from exprl_megatron.utils import package_names

ROOT = Path(__file__).parents[2] / "exprl_megatron"


def test_the_answer_for_this_environment_is_that_of_python():
    expected = importlib.metadata.packages_distributions()
    found = package_names.packages_distributions()
    assert {name: sorted(set(has)) for name, has in found.items()} == {
        name: sorted(set(has)) for name, has in expected.items()
    }
    assert "torch" in found and found["PIL"] == ["pillow"]


def test_packages_are_what_was_installed_at_the_top(tmp_path):
    odd = tmp_path / "odd-1.0.dist-info"
    odd.mkdir()
    (odd / "METADATA").write_text("Metadata-Version: 2.1\nName: odd\n\nName: another\n")
    (tmp_path / "single.py").touch()
    (tmp_path / "odd,package").mkdir()
    (tmp_path / "odd,package" / "__init__.py").touch()
    (distribution,) = importlib.metadata.distributions(path=[str(tmp_path)])
    assert package_names._name(distribution) == "odd"
    plain = "single.py,sha256=x,3\n../bin/odd,,\ngone.py,,\nodd-1.0.dist-info/RECORD,,\n"
    for record, packages in ((plain, ["single"]), (f'"odd,package/__init__.py",,\n{plain}', ["odd,package", "single"])):
        (odd / "RECORD").write_text(record)
        assert sorted(package_names._recorded(distribution)) == packages


@pytest.mark.parametrize("module", ["serving/server_preload.py", "launch/trainer_preload.py"])
def test_fork_servers_install_fast_lookup_before_they_import_anything_else(module):
    _, first, second, *_ = ast.parse((ROOT / module).read_text(encoding="utf-8")).body
    assert ast.unparse(first) == "from exprl_megatron.utils.package_names import install_fast_lookup"
    assert ast.unparse(second) == "install_fast_lookup()"
