"""What is done where the machine does not offer every layer of containment, and what each layer does by itself."""

import asyncio
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from exprl_megatron.judging.judgement import Abstained
from exprl_megatron.problems.problem import CodeTest
from exprl_megatron.rewards import containment
from exprl_megatron.rewards.code_answer import CodeVerifier
from exprl_megatron.rewards.code_sandbox import CodeSandbox, sandbox_available

REFUSING = """#!{python}
# Starts Python with a filter that refuses system calls, as containers have it.
import errno, os, sys
from exprl_megatron.rewards import seccomp
seccomp.set_no_new_privileges()
program = [seccomp._load(0)]
for number in {numbers}:
    program += [seccomp._skip_unless(number, 1), seccomp._return(seccomp._ERROR | errno.EPERM)]
seccomp._install([*program, seccomp._return(seccomp._ALLOW)], 0)
os.execv({python!r}, [{python!r}, *sys.argv[1:]])
"""
LISTENING = """#!{python}
# Starts Python where somebody else listens to a filter already: there can be one such only.
import os, sys
from exprl_megatron.rewards import seccomp
seccomp.set_no_new_privileges()
os.set_inheritable(seccomp._install([seccomp._return(seccomp._ALLOW)], seccomp._NEW_LISTENER), True)
os.execv({python!r}, [{python!r}, *sys.argv[1:]])
"""
OTHER_MACHINE = '#!/bin/sh\nexec setarch i686 {quoted} "$@"\n'
SECCOMP = {"x86_64": 317, "aarch64": 277}[os.uname().machine]
UNSHARE, CHROOT = {"x86_64": (272, 161), "aarch64": (97, 51)}[os.uname().machine]
LANDLOCK_CREATE = 444


@pytest.fixture
def interpreter(tmp_path, monkeypatch):
    """Has workers started by a script instead of by Python itself."""

    def use(script: str, **values: object) -> None:
        path = tmp_path / "python"
        path.write_text(script.format(python=sys.executable, quoted=shlex.quote(sys.executable), **values))
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return use


def _verdict() -> object:
    with CodeVerifier() as verifier:
        test = CodeTest("", "1")
        return asyncio.run(verifier.verify([test], "```python\nprint(1)\n```", 60.0))


def test_every_layer_that_is_there_is_named():
    available = sandbox_available()
    assert available.ok
    assert available.found.startswith("seccomp, ")


def test_where_the_kernel_refuses_everything_optional_programs_still_run(interpreter):
    interpreter(REFUSING, numbers=(UNSHARE, CHROOT, LANDLOCK_CREATE))
    assert sandbox_available().found == "seccomp, threads counted"
    assert _verdict().value == 1.0


def test_where_threads_cannot_be_counted_there_are_none(interpreter):
    interpreter(LISTENING)
    sandbox = CodeSandbox(optional_layers=False)
    try:
        assert sandbox.layers() == ["seccomp", "no threads"]
        assert sandbox.run("print(1)", "", None, 60.0).output == "1\n"
        started = sandbox.run("import threading\nthreading.Thread(target=print).start()", "", None, 60.0)
        assert started.error.strip().endswith("can't start new thread")
    finally:
        sandbox.close()


@pytest.mark.parametrize(
    ("script", "why"),
    [(REFUSING, "the program was not contained"), (OTHER_MACHINE, "there is no seccomp filter for linux on i686")],
)
def test_where_programs_cannot_be_contained_none_is_run(interpreter, script, why):
    interpreter(script, numbers=(SECCOMP,))
    available = sandbox_available()
    assert not available.ok
    assert why in available.found
    verdict = _verdict()
    assert isinstance(verdict, Abstained)
    assert verdict.reason == "no-sandbox"
    assert why in verdict.evidence


def test_a_worker_that_does_not_start_is_an_abstention(interpreter):
    interpreter("#!/bin/sh\nexit 1\n")
    verdict = _verdict()
    assert isinstance(verdict, Abstained)
    assert verdict.reason == "verifier-error"
    assert not sandbox_available().ok


def _alone(code: str, *arguments: str) -> str:
    """What a process prints that has one layer and no other."""
    prelude = "import os, signal, socket, sys\nfrom exprl_megatron.rewards import containment, seccomp\n"
    run = subprocess.run(
        [sys.executable, "-c", prelude + code, *arguments], capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or run.stderr.strip().splitlines()[-1]


@pytest.mark.skipif(containment.landlock_version() == 0, reason="this kernel has no Landlock")
@pytest.mark.parametrize(
    ("attempt", "since"),
    [
        ("open('/etc/hostname')", 1),
        ("os.listdir('/')", 1),
        ("open('made', 'w')", 1),
        ("os.truncate(sys.argv[1], 0)", 3),
        ("socket.create_server(('127.0.0.1', 0))", 4),
        ("os.kill(os.getppid(), 0)", 6),
    ],
)
def test_landlock_by_itself(attempt, since, tmp_path):
    if containment.landlock_version() < since:
        pytest.skip(f"this kernel's Landlock is older than version {since}")
    code = f"seccomp.set_no_new_privileges()\ncontainment.deny_with_landlock()\n{attempt}\nprint('done')"
    file = tmp_path / "file"
    file.write_text("whole")
    assert _alone(code, str(file)).startswith("PermissionError")
    assert file.read_text() == "whole"


def test_namespaces_by_themselves():
    layers = _alone("print(containment.drop_machine_access())")
    if "network namespace" in layers:
        code = (
            "server = socket.create_server(('127.0.0.1', 0))\ncontainment.drop_machine_access()\n"
            "socket.socket().connect(server.getsockname())\nprint('done')"
        )
        assert _alone(code).startswith(("OSError", "ConnectionRefusedError"))
    if "empty root directory" in layers:
        assert _alone("containment.drop_machine_access()\nprint(os.path.exists('/etc'), os.listdir('/'))") == "False []"
    if not layers.strip("[]"):
        pytest.skip("there are none here")


def test_limits_and_rights_by_themselves():
    code = (
        "import resource\ncontainment.contain_program(os.getppid(), containment.Limits(memory_bytes=2**28))\n"
        "print([l for l in open('/proc/self/status').read().splitlines() if l.startswith(('CapEff', 'NoNew'))],\n"
        "      resource.getrlimit(resource.RLIMIT_AS), resource.getrlimit(resource.RLIMIT_FSIZE))"
    )
    assert _alone(code) == f"['CapEff:\\t{16 * '0'}', 'NoNewPrivs:\\t1'] ({2**28}, {2**28}) (0, 0)"


NEEDING = """#!/bin/sh
# A Python that starts only with what `module load` sets.
[ "$LD_LIBRARY_PATH" = "/apps/lib" ] && [ "$PYTHONHOME" = {home!r} ] && [ -z "$EXPRL_TEST_SECRET" ] || exit 127
exec {python!r} "$@"
"""
SHOW_ENVIRONMENT = "import os\nprint(dict(os.environ), os.getenv('LD_LIBRARY_PATH'))"


def test_the_worker_gets_what_its_interpreter_needs_and_programs_get_no_environment(interpreter, monkeypatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", "/apps/lib")
    monkeypatch.setenv("PYTHONHOME", sys.base_prefix)
    monkeypatch.setenv("EXPRL_TEST_SECRET", "sphinx")
    interpreter(NEEDING, home=sys.base_prefix)
    sandbox = CodeSandbox()
    try:
        assert sandbox.run(SHOW_ENVIRONMENT, "", None, 60.0).output == "{} None\n"
    finally:
        sandbox.close()


def test_an_interpreter_elsewhere_whose_libraries_the_environment_names(tmp_path, monkeypatch):
    """As `module load python` has it: a tree of its own, and no path to its library in the binary."""
    library = Path(sysconfig.get_config_var("LIBDIR")) / sysconfig.get_config_var("INSTSONAME")
    if not library.name.endswith((".so", ".so.1.0")) or not library.exists():
        pytest.skip("this Python has no shared library")
    tree = tmp_path / "apps" / "python"
    (tree / "bin").mkdir(parents=True)
    (tree / "lib").mkdir()
    python = tree / "bin" / "python3"
    built_in = f"{library.parent}\0".encode()
    binary = Path(sys.executable).resolve().read_bytes()
    python.write_bytes(binary.replace(built_in, b"/nowhere".ljust(len(built_in) - 1, b"_") + b"\0"))
    python.chmod(0o755)
    shutil.copy(library, tree / "lib")
    stdlib = Path(sysconfig.get_path("stdlib"))
    (tree / "lib" / stdlib.name).symlink_to(stdlib)
    monkeypatch.setattr(sys, "executable", str(python))
    if built_in in binary:
        assert not sandbox_available().ok
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tree / "lib"))
    assert sandbox_available().ok
    assert _verdict().value == 1.0
