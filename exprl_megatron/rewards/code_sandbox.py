"""The client side of the sandbox that runs untrusted programs."""

import importlib.util
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from exprl_megatron.rewards.containment import DEFAULT_LIMITS, Limits
from exprl_megatron.rewards.worker_process import WorkerProcess

START_DEADLINE_S = 120.0
_GRACE_S = 20.0
"""Seconds that the worker may need to answer in addition to the program's own time."""
_BOOT = """
import sys
sys.path.extend(sys.argv[3:])
from exprl_megatron.rewards.code_worker import serve
serve(sys.argv[1] == "all", tuple(filter(None, sys.argv[2].split(","))))
"""
_DEPTH = """
import functools

@functools.cache
def deepest(depth):
    try:
        return deepest(depth + 1) if depth < 10_000 else depth
    except RecursionError:
        return depth

print(deepest(0))
"""
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
"""The worker's environment; programs have none. The seed makes results repeatable; a forked process has no threads."""
_INTERPRETER_VARIABLES = ("LD_LIBRARY_PATH", "PYTHONHOME")
"""Variables that a Python outside of the system's directories may need to start; `module load python` sets them."""


class SandboxUnavailable(Exception):
    """This machine cannot contain programs; the message has the reason."""


class SandboxFailed(Exception):
    """A program did not run to its end, and the program is not the cause; the message has the reason."""


@dataclass(frozen=True)
class ProgramOutcome:
    """The result of one run of a program."""

    ending: Literal["finished", "failed", "time", "output"]
    """`failed`: it ended with an exception, an exit status or a signal; `time`, `output`: it exceeded that limit."""
    output: str
    """Standard output; of a call the returned value as JSON."""
    error: str
    """The end of standard error."""


@dataclass(frozen=True)
class Availability:
    """Whether programs can be run here."""

    ok: bool
    found: str
    """The layers of containment, or why there is none."""


class CodeSandbox:
    """A worker process that runs one program at a time; the first program starts it.

    Only one thread at a time may use it.

    Args:
        limits: limits of one program.
        modules: modules that programs can import in addition to `code_program.MODULES`.
        optional_layers: whether to use layers that need privileges or a recent kernel (containment.py).
    """

    def __init__(self, limits: Limits = DEFAULT_LIMITS, modules: tuple[str, ...] = (), optional_layers: bool = True):
        self._limits = limits
        self._modules = modules
        self._optional_layers = optional_layers
        self._worker: WorkerProcess | None = None

    def layers(self) -> list[str]:
        """Start the worker if needed, and return the names of the layers that contain programs on this machine.

        Raises:
            SandboxUnavailable: this machine cannot contain programs.
            SandboxFailed: the worker does not start.
        """
        return self._ready()[1]

    def run(self, program: str, text: str, function: str | None, wall_s: float) -> ProgramOutcome:
        """Run `program` on the input `text`, or call its `function` with one argument from each line of `text`.

        The program is killed after `wall_s` seconds.

        Raises:
            SandboxUnavailable: this machine cannot contain programs.
            SandboxFailed: the program did not run to its end, and the program is not the cause.
        """
        worker, _ = self._ready()
        request = {"program": program, "function": function, "input": text, "wall_s": wall_s}
        try:
            reply = worker.ask({**request, "limits": asdict(self._limits)}, wall_s + _GRACE_S)
        except (TimeoutError, EOFError) as error:
            self.close()
            raise SandboxFailed(str(error)) from error
        if "failure" in reply:
            raise SandboxFailed(reply["failure"])
        return ProgramOutcome(**reply)

    def close(self) -> None:
        """End the worker and a running program."""
        if self._worker is not None:
            self._worker.kill()
            self._worker = None

    def _ready(self) -> tuple[WorkerProcess, list[str]]:
        """Return the running worker, which is started if needed, and the names of its layers; raises as `layers`."""
        worker = self._worker
        if worker is None or not worker.alive:
            self.close()
            worker = self._worker = self._start()
        try:
            greeting = worker.wait_until_ready(START_DEADLINE_S)
        except RuntimeError as error:
            raise SandboxFailed(str(error)) from error
        if "refused" in greeting:
            raise SandboxUnavailable(greeting["refused"])
        return worker, greeting["layers"]

    def _start(self) -> WorkerProcess:
        numpy = importlib.util.find_spec("numpy")
        paths = [str(Path(__file__).parents[2])]
        if numpy is not None and numpy.origin is not None:
            paths.append(str(Path(numpy.origin).parents[1]))
        layers = "all" if self._optional_layers else "needed"
        python = [sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8", "-c", _BOOT]
        command = [*python, layers, ",".join(self._modules), *paths]
        needed = {name: os.environ[name] for name in _INTERPRETER_VARIABLES if name in os.environ}
        return WorkerProcess(command, env=_ENVIRONMENT | needed, cwd="/", new_session=True)


def recursion_depth() -> int:
    """Measure the depth to which a program can recurse through `functools.cache`, up to 10,000.

    Raises:
        SandboxUnavailable: this machine cannot contain programs.
        SandboxFailed: the program did not run to its end.
    """
    sandbox = CodeSandbox()
    try:
        return int(sandbox.run(_DEPTH, "", None, START_DEADLINE_S).output)
    finally:
        sandbox.close()


def sandbox_available() -> Availability:
    """Return whether this machine can contain programs; a program is run to find out."""
    sandbox = CodeSandbox()
    try:
        return Availability(True, ", ".join(sandbox.layers()))
    except (SandboxUnavailable, SandboxFailed) as error:
        return Availability(False, str(error))
    finally:
        sandbox.close()
