"""Starts a run's processes, each under a supervisor that stops it when this process ends (processes/supervise.py)."""

import subprocess
from collections.abc import Mapping, Sequence
from typing import IO, Self

from exprl_megatron.processes.child import Child
from exprl_megatron.processes.fork_server import ForkRequest, ForkServer
from exprl_megatron.processes.supervise import supervised_command


class Starter:
    """Starts each program by exec, or in a fork server that has its libraries; as a context manager, closes these."""

    def __init__(self, fork_servers: Sequence[ForkServer] = ()):
        self._fork_servers = fork_servers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for server in self._fork_servers:
            server.close()

    def start(
        self,
        name: str,
        command: list[str],
        environment: Mapping[str, str],
        output: IO | None,
        errors: IO | None,
        *,
        grace_s: float | None = 5.0,
        inherited: Mapping[str, int] | None = None,
    ) -> Child:
        """Start `command` ([sys.executable, "-m", MODULE, ...]) supervised, or just started where `grace_s` is None.

        `inherited` are descriptors that the program is to have, by the environment variables that hold their numbers.
        `output` or `errors` None: this process's.
        """
        inherited = inherited or {}
        request = ForkRequest(command, dict(environment), grace_s, name, list(inherited))
        standard = [1 if output is None else output.fileno(), 2 if errors is None else errors.fileno()]
        for server in self._fork_servers:
            if command[2] in server.programs:
                child = server.start(request, [*standard, *inherited.values()])
                if child is not None:
                    return child
        return subprocess.Popen(
            command if grace_s is None else supervised_command(command, grace_s),
            env=dict(environment) | {variable: str(number) for variable, number in inherited.items()},
            pass_fds=tuple(inherited.values()),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            # Ctrl-C is for us: we decide when they stop.
            start_new_session=True,
        )
