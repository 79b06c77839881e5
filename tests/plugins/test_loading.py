"""The user's own modules are found where the docs say, and what cannot be loaded is named with its file and line."""

import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from exprl_megatron.config import plugin_path
from exprl_megatron.config.problems import ProblemsConfig
from exprl_megatron.plugins.failures import PluginError
from exprl_megatron.plugins.loading import load_plugin, plugin_source, use_plugin_path
from exprl_megatron.plugins.long_calls import says_what_takes_long
from exprl_megatron.problems.sources import load_problems


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """An empty working directory; modules, search path and caches are as before afterwards."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        del sys.modules[name]
    load_plugin.cache_clear()
    plugin_path.installed_plugins.cache_clear()


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_module_is_found_in_the_working_directory_before_plugin_path_and_there_before_the_python_path(
    tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(str(tmp_path / "installed"))
    for place in ("installed", "shared", "work"):
        write(tmp_path / place / "mine_everywhere.py", f"def f(): return {place!r}\n")
    for place in ("installed", "shared"):
        write(tmp_path / place / "mine_elsewhere.py", f"def f(): return {place!r}\n")
    write(tmp_path / "installed" / "mine_installed.py", "def f(): return 'installed'\n")
    use_plugin_path(["../shared"])
    found = [load_plugin(f"mine_{name}:f")() for name in ("everywhere", "elsewhere", "installed")]
    assert found == ["work", "shared", "installed"]


def test_modules_in_packages_and_members_of_classes_have_paths(tmp_path):
    write(Path("mypkg/rewards.py"), "class Box:\n    @staticmethod\n    def f(): return 7\n")
    assert load_plugin("mypkg.rewards:Box.f")() == 7


def test_a_class_is_made_once(tmp_path):
    write(
        Path("mine_class.py"),
        "made = []\nclass V:\n    def __init__(self): made.append(1)\n    def __call__(self): return made\n",
    )
    assert load_plugin("mine_class:V")() == load_plugin("mine_class:V")() == [1]


@pytest.mark.parametrize(
    ("path", "source", "sentence"),
    [
        ("not_there:f", None, r"there is no module not_there in the working directory \(.*/work\), in plugin_path or"),
        ("broken:f", "import math\ndef f(:\n", r"/work/broken\.py, line 2: SyntaxError: invalid syntax\.$"),
        ("broken:f", "x = 1\ny = x / 0\n", r"/work/broken\.py, line 2, in <module>: ZeroDivisionError: div"),
        ("broken:f", "import no_such_library\n", r"broken\.py, line 1, in <module>: ModuleNotFoundError: .*no_such"),
        ("broken:f", "import json\njson.loads('{')\n", r"broken\.py, line 2, in <module>: JSONDecodeError: "),
        ("broken:f", "import sys\nsys.exit(3)\n", r"broken\.py, line 2, in <module>: SystemExit: 3"),
        ("broken:f", "def g(): pass\n", r"/work/broken\.py defines no f; correct the name\.$"),
        ("broken:f", "f = 3\n", r"The plugin broken:f is a int, which cannot be called"),
        ("broken:F", "class F:\n    def __init__(self, url): pass\n", r"broken\.py, line 1: TypeError: .*__init__"),
        ("broken:F", "class F:\n    def __init__(self):\n        {}['key']\n", r"broken\.py, line 3, in __init__: Key"),
        ("broken:F", "class F: pass\n", r"is a F, which cannot be called; name a function in .*broken\.py, or a class"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_is_named_with_file_and_line(path, source, sentence):
    if source is not None:
        write(Path("broken.py"), source)
    with pytest.raises(PluginError, match=sentence) as caught:
        load_plugin(path)
    assert "\n" not in str(caught.value)


def test_an_installed_package_offers_plugins_by_name(tmp_path, monkeypatch):
    site = tmp_path / "site"
    write(site / "rewards_of_mine.py", "def polite(problem, trace): return 0.25\n")
    info = site / "rewards_of_mine-1.0.dist-info"
    write(info / "METADATA", "Metadata-Version: 2.1\nName: rewards-of-mine\nVersion: 1.0\n")
    write(info / "entry_points.txt", "[exprl_megatron.plugins]\npolite = rewards_of_mine:polite\n")
    monkeypatch.syspath_prepend(str(site))
    plugin_path.installed_plugins.cache_clear()
    assert plugin_path.is_plugin("polite") and not plugin_path.is_plugin("rude")
    assert load_plugin("polite")(None, None) == 0.25
    assert plugin_source("polite").file == str(site / "rewards_of_mine.py")
    with pytest.raises(
        PluginError, match=r"no plugin 'rude' among the entry points .* \(polite\); install its package"
    ):
        load_plugin("rude")


def test_the_hash_of_a_plugin_is_that_of_its_file(tmp_path):
    file = write(Path("mine_hashed.py"), "def f(): pass\n")
    expected = subprocess.run(["sha256sum", str(file)], capture_output=True, text=True, check=True).stdout.split()[0]
    assert plugin_source("mine_hashed:f").sha256 == expected


def test_an_import_or_a_source_that_takes_long_says_what_it_is_doing(tmp_path, monkeypatch):
    said = []

    @contextmanager
    def listens(what):
        said.append(what())
        yield

    monkeypatch.setattr("exprl_megatron.plugins.loading.says_what_takes_long", listens)
    monkeypatch.setattr("exprl_megatron.problems.sources.says_what_takes_long", listens)
    (tmp_path / "takes_long.py").write_text(
        "class Verifier:\n    def __call__(self, problem, trace): pass\n"
        "def load(split): return [{'id': '1', 'problem': 'What?', 'answer': '1'}]\n"
    )
    use_plugin_path([str(tmp_path)])
    load_plugin("takes_long:Verifier")
    load_problems(ProblemsConfig(source="takes_long:load"))
    assert said[:2] == [
        "importing takes_long for takes_long:Verifier ...",
        "making an instance of takes_long:Verifier ...",
    ]
    assert "reading problems from takes_long:load: 0 records so far ..." in said


def test_what_takes_long_is_said_until_it_has_ended(monkeypatch, capfd):
    monkeypatch.setattr("exprl_megatron.plugins.long_calls.FIRST_S", 0.0)
    monkeypatch.setattr("exprl_megatron.plugins.long_calls._LATER_S", (0.0, 0.0))
    counted = iter(range(1, 10))
    third = threading.Event()

    def what():
        number = next(counted)
        if number == 3:
            third.set()
        return f"importing, {number}"

    with says_what_takes_long(what):
        assert third.wait(60)
    assert capfd.readouterr().err.startswith("importing, 1\nimporting, 2\n")
