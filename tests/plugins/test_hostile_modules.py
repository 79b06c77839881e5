"""Modules of the user that cannot be used are one sentence with their file, whatever goes wrong in them."""

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from exprl_megatron.config import plugin_path
from exprl_megatron.judging.judgement import Scored
from exprl_megatron.plugins.calling import Plugin
from exprl_megatron.plugins.failures import PluginError
from exprl_megatron.plugins.loading import load_plugin, use_plugin_path
from exprl_megatron.problems.problem import Problem
from exprl_megatron.rollout.custom_functions import CustomFunction
from exprl_megatron.rollout.trace import Trace


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """An empty working directory; modules, search path and caches are as before afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    load_plugin.cache_clear()
    use_plugin_path([])
    yield
    for name in set(sys.modules) - known:
        del sys.modules[name]
    load_plugin.cache_clear()
    plugin_path.installed_plugins.cache_clear()


def refused(path: str, **files: str) -> str:
    """The sentence for the plugin `path`, with these modules in the working directory."""
    for name, text in files.items():
        Path(f"{name}.py").write_text(text)
    with pytest.raises(PluginError) as caught:
        load_plugin(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("import asyncio\nraise asyncio.CancelledError\n", "hostile.py, line 2, in <module>: CancelledError."),
        ("class Panic(BaseException): pass\nraise Panic('in Rust')\n", "hostile.py, line 2, in <module>: Panic: in R"),
        ("def __getattr__(name):\n    raise OSError(name)\n", "hostile.py, line 2, in __getattr__: OSError: f"),
        ("x = 1\0\n", "hostile.py: SyntaxError: source code"),
        ("def f(:\n", "hostile.py, line 1: SyntaxError: "),
    ],
)
def test_any_exception_of_a_module_is_a_sentence_with_its_file(body, said):
    assert said in refused("hostile:f", hostile=body)


def test_any_exception_of_a_class_is_a_sentence_with_its_line():
    body = "class Panic(BaseException): pass\nclass C:\n    def __init__(self):\n        raise Panic('x')\n"
    assert "hostile.py, line 4, in __init__: Panic: x" in refused("hostile:C", hostile=body)


def test_ctrl_c_during_an_import_is_not_a_failure_of_the_module():
    Path("hostile.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_plugin("hostile:f")


def test_a_circular_import_is_named_with_the_line_of_the_import():
    said = refused("hostile:f", hostile="import other\ndef f(): pass\n", other="from hostile import f\n")
    assert "other.py, line 1, in <module>: ImportError: cannot import name 'f' from partially initialized" in said


@pytest.mark.parametrize("name", ["random", "sched"])
def test_a_module_with_the_name_of_one_of_pythons_is_refused_with_its_file(name):
    """Whether Python's own is imported already or not: what is imported later would get the user's."""
    said = refused(f"{name}:f", **{name: "def f(): pass\n"})
    assert f"/{name}.py: {name} is a module of Python's standard library; rename your module." in said


def test_pythons_own_modules_can_be_named_where_the_user_has_none_of_that_name():
    assert load_plugin("operator:itemgetter.__call__") is not None


@pytest.mark.parametrize("name", ["exprl_megatron", "numpy"])
def test_a_package_with_the_name_of_one_that_is_imported_already_is_refused_with_both_files(name):
    Path(name).mkdir()
    Path(name, "__init__.py").write_text("def f(): pass\n")
    said = refused(f"{name}:f")
    assert f"/{name}/__init__.py: {name} is imported from " in said and said.endswith(" already; rename your module.")


def test_a_file_name_in_place_of_a_module_is_corrected():
    assert refused("hostile.py:f", hostile="def f(): pass\n").endswith("write the module's name, hostile.")


def test_a_directory_in_place_of_a_module_is_named():
    Path("folder").mkdir()
    assert "/folder, a directory without __init__.py, defines no f" in refused("folder:f")


def test_what_a_module_prints_is_not_in_the_output_of_a_command(capsys):
    Path("hostile.py").write_text("print('loading')\ndef f(): pass\n")
    load_plugin("hostile:f")
    assert capsys.readouterr() == ("", "loading\n")


def verdict(function, deadline_s=60.0):
    custom = CustomFunction(Plugin("verifier.domains.math", "mine:function", function), deadline_s)
    trace = Trace("p", 0, [1], [3, 4], [-1.0, -2.0], "4", "stop", (("v0", 0, 2),))
    return custom.verify(Problem("p", "What is 2 + 2?", answer="4"), trace)


async def _interrupts(problem, trace):
    raise KeyboardInterrupt


async def _starts_what_exits(problem, trace):
    async def exits():
        sys.exit(3)

    await asyncio.create_task(exits())


@pytest.mark.parametrize("function", [_interrupts, _starts_what_exits])
def test_an_async_function_cannot_end_the_event_loop_of_the_run(function):
    found = asyncio.run(verdict(function))
    assert found.reason == "verifier-error" and "test_hostile_modules.py, line" in found.evidence


async def _is_well(problem, trace):
    return Scored(1.0)


def test_the_functions_that_follow_one_that_exits_are_called():
    assert asyncio.run(verdict(_starts_what_exits)).reason == "verifier-error"
    assert asyncio.run(verdict(_is_well)) == Scored(1.0, "")


def test_an_async_function_that_blocks_its_thread_misses_its_deadline_and_does_not_block_the_run():
    go_on = threading.Event()

    async def blocks(problem, trace):
        go_on.wait(20)
        return Scored(1.0)

    async def step():
        found = await verdict(blocks, deadline_s=0.05)
        go_on.set()
        return found

    assert asyncio.run(step()).reason == "verifier-timeout"


def test_async_functions_of_all_calls_share_an_event_loop():
    """A session of aiohttp that the first call opens is used by the others."""
    loops = set()

    async def keeps(problem, trace):
        loops.add(asyncio.get_running_loop())
        return Scored(1.0)

    for _ in range(2):
        asyncio.run(verdict(keeps))
    assert len(loops) == 1


def test_a_forked_process_has_an_event_loop_of_its_own():
    code = (
        "import asyncio, os\n"
        "from exprl_megatron.plugins.async_calls import in_plugin_loop\n"
        "async def one(): return 1\n"
        "ask = lambda: asyncio.run(asyncio.wait_for(in_plugin_loop(one), 20))\n"
        "ask()\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(ask())\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "1\n"
