"""The shell scripts of a job: what runs on each node, and what the batch script does around it."""

import shlex
from dataclasses import dataclass

from exprl_megatron.errors import UserError
from recipes.places import Component, Site, check_path

RESOLVED = "resolved.yaml"
"""A run's whole config, in its directory: `exprl train FILE` repeats the run without NeMo-Run."""
RESUMABLE = 75
"""Exit status of `exprl train` that was asked to stop, has written a checkpoint, and can be resumed."""

# The directory of the job: NeMo-Run mounts it there in a container, and puts the real path in its place elsewhere.
_SHIPPED = f"/nemo_run/code/{RESOLVED}"
_BEGUN = '[ -f "$run/config.yaml" ]'
"""There is a run to go on with."""


@dataclass(frozen=True)
class Place:
    """A run and where it runs."""

    directory: str
    """The run's, as in its config."""
    site: Site
    container: bool = False

    def check(self) -> None:
        """Raise UserError where a script with these values would not do what it says."""
        for what, path in (
            ("directory", self.directory),
            ("site.workdir", self.site.workdir),
            ("site.venv", self.site.venv),
            *((f"site.variables[{name!r}]", value) for name, value in self.site.variables.items()),
        ):
            check_path(what, path)
        for name in (*self.site.environment, *self.site.variables):
            if not name.isidentifier():
                raise UserError(f"{name!r} is not a name of a variable; fix site.environment or site.variables.")


def trainer(place: Place, component: Component, resume: bool) -> str:
    """Return the trainer's share of a node, for as many as there are; the first one's verdict is the job's."""
    several = ""
    if component.nodes > 1:
        count = '"$nodes"' if component.fewer else component.nodes
        several = f' --nodes {count} --node-rank "$SLURM_NODEID" --master "$MASTER_ADDR:$MASTER_PORT"'
    replicas = ' "${replicas[@]}"' if component.fewer else ""
    return _lines(
        *_beginning(place, component),
        *_fewer(component),
        f"run={shlex.quote(place.directory)}",
        *_resume(_BEGUN if resume else f'[ "${{SLURM_RESTART_COUNT:-0}}" -gt 0 ] && {_BEGUN}'),
        'mkdir -p "$run"',
        "# A run that is there, and is not to be resumed, will be refused; it keeps its file.",
        f'if ! {_BEGUN} || [ "${{#resume[@]}}" -gt 0 ]; then',
        # All nodes write the same; a reader finds the old file or the new one.
        f'    cp {_SHIPPED} "$run/{RESOLVED}.$SLURM_NODEID"',
        f'    mv "$run/{RESOLVED}.$SLURM_NODEID" "$run/{RESOLVED}"',
        "fi",
        f'exec exprl train "$run/{RESOLVED}"{replicas} --servers registered{several} "${{resume[@]}}"',
    )


def servers(place: Place, component: Component) -> str:
    """Return one kind of servers on a node, until the trainer has ended."""
    return _lines(
        *_beginning(place, component),
        f'exprl serve {_SHIPPED} --kind {component.kind} --nodes {component.nodes} --node-rank "$SLURM_NODEID"',
        "# The run has ended. The job's verdict is that of the process that ends first: it has to be the trainer's.",
        "sleep 600",
        f'echo "{component.kind}: the run has ended, but its trainer has not" >&2',
        "exit 1",
    )


def local(place: Place, resume: bool, after: str | None) -> str:
    """Return a whole run on this machine, once the stage `after` has succeeded in the same experiment."""
    mark = "${0%/*}/succeeded"
    guard = []
    if after is not None:
        # NeMo-Run starts the next job of a LocalExecutor whatever became of this one.
        guard = [
            f'if [ ! -f "${{0%/*}}/../../{after}/scripts/succeeded" ]; then',
            f'    echo "not started: {after} has failed" >&2',
            "    exit 1",
            "fi",
        ]
    return _lines(
        *guard,
        # Before the working directory changes.
        f'mark=$(realpath "{mark}")',
        *_beginning(place, None),
        f"run={shlex.quote(place.directory)}",
        *_resume(_BEGUN if resume else "false"),
        f'exprl train "$run/{RESOLVED}" "${{resume[@]}}"',
        'touch "$mark"',
    )


def around(restarts: int) -> str:
    """Return what the batch script does before it starts the components, of which the trainer is the first.

    Slurm's signal ahead of the time limit (SIGUSR1) is forwarded to the trainer, which writes a checkpoint and ends
    with status 75; the job is then queued again, `restarts` times at most, and resumes.
    """
    return _lines(
        'nodelist="${SLURM_JOB_NODELIST_HET_GROUP_0:-$SLURM_JOB_NODELIST}"',
        'export MASTER_ADDR="$(scontrol show hostnames "$nodelist" | head -n1)"',
        # Beside the ports of servers and below those of outgoing connections.
        "export MASTER_PORT=$((32000 + SLURM_JOB_ID % 768))",
        "trap 'kill -USR1 \"${pids[0]}\"' USR1",
        "requeue() {",
        f'    if [ "$1" -eq {RESUMABLE} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ]; then',
        '        scontrol requeue "$SLURM_JOB_ID"',
        "    fi",
        "}",
        "trap 'requeue $?' EXIT",
    ).strip()


def _beginning(place: Place, component: Component | None) -> list[str]:
    site = place.site
    lines = ["set -euo pipefail", f"cd {shlex.quote(site.workdir)}"]
    lines += [f': "${{{name}:?is not set where the job runs}}"' for name in site.environment]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in site.variables.items()]
    if site.venv and not place.container:
        lines.append(f'export PATH="$(realpath {shlex.quote(site.venv)})/bin:$PATH"')
    if component is not None and component.devices is not None:
        lines.append(f"export CUDA_VISIBLE_DEVICES={','.join(map(str, component.devices))}")
    return lines


def _fewer(component: Component) -> list[str]:
    """`nodes`, how many of the job's the trainer uses, and `replicas`, what its config changes where they are fewer."""
    if not component.fewer:
        return []
    wanted, lines = component.nodes, [f"nodes={component.nodes}", "replicas=()"]
    for fewer in component.fewer:
        change = f"nodes={fewer.nodes} replicas=(policy.layout.dp={fewer.dp})"
        lines.append(f'if [ "$SLURM_STEP_NUM_NODES" -lt {wanted} ]; then {change}; fi')
        wanted = fewer.nodes
    return [*lines, "# Whole replicas leave it without work.", 'if [ "$SLURM_NODEID" -ge "$nodes" ]; then exit 0; fi']


def _resume(when: str) -> list[str]:
    """Return the array `resume`: the flag where the test `when` holds."""
    return ["resume=()", f"if {when}; then resume=(--resume); fi"]


def _lines(*lines: str) -> str:
    return "\n".join(("", *lines, ""))
