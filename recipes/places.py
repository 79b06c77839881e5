"""Where the processes of a job run: nodes, GPUs, and how code, data and secrets are found there."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import ceil

from exprl_megatron.config.run import RunConfig
from exprl_megatron.errors import UserError

_REWRITTEN = "/nemo_run"


@dataclass
class Nodes:
    """Nodes of each kind of process; 0 servers' nodes: they share those of the kind before them."""

    trainer: int = 1
    policy: int = 0
    """0: sampling servers share the trainer's nodes: its GPUs where placement.kind is colocated, else others."""
    judge: int = 0
    """0: judge servers share the sampling servers' nodes."""
    gpus: int = 8
    """GPUs of a node; 0 on a machine without any."""
    trainer_least: int = 0
    """With so many nodes the trainer starts, or continues, where Slurm has no more; 0: never with fewer."""


@dataclass
class Site:
    """How a job finds what it needs on the machine where it runs."""

    workdir: str = ""
    """Relative paths of the config are taken from here; empty: the directory of the submission."""
    venv: str = ".venv"
    """Put in front of PATH where it is there and no container is used; empty: `exprl` is on the PATH."""
    environment: list[str] = field(default_factory=list)
    """Names of variables that the job needs, as for secrets: their values are in no file that is written here."""
    variables: dict[str, str] = field(default_factory=dict)
    """Variables that are set in the job's scripts, for all to read."""


@dataclass(frozen=True)
class Fewer:
    """The trainer on fewer nodes, each with as many processes as before, and with fewer replicas of the model."""

    nodes: int
    dp: int


@dataclass(frozen=True)
class Component:
    """Processes of one kind in a job: a script that runs once on each of its nodes."""

    kind: str
    """`trainer`, `policy`, `judge` or `start`."""
    nodes: int
    allocation: int
    """Components with the same number share their nodes."""
    devices: tuple[int, ...] | None = None
    """The GPUs of each node that are this component's; None: all."""
    fewer: tuple["Fewer", ...] = ()
    """What it makes do with, the most nodes first."""

    @property
    def least(self) -> int:
        """The fewest nodes that it runs on."""
        return self.fewer[-1].nodes if self.fewer else self.nodes


def components(config: RunConfig, nodes: Nodes) -> list[Component]:
    """Return the components of a job that runs `config`, the trainer first.

    Raises UserError with a sentence for every way in which they do not fit on `nodes`.
    """
    found = [Component("trainer", nodes.trainer, 0, fewer=fewer_nodes(config, nodes))]
    for kind, of_its_own in _wanted(config, nodes):
        last = found[-1]
        if of_its_own:
            found.append(Component(kind, of_its_own, last.allocation + 1))
        else:
            found.append(Component(kind, last.nodes, last.allocation))
    if nodes.gpus:
        found = [_on_devices(component, found, config) for component in found]
    if sentences := list(_violations(config, nodes, found)):
        raise UserError("\n".join(sentences))
    return found


def fewer_nodes(config: RunConfig, nodes: Nodes) -> tuple[Fewer, ...]:
    """Return the numbers of trainer nodes, from nodes.trainer_least on, that whole replicas of the model fill."""
    layout = config.policy.layout
    if not nodes.trainer_least or layout.world_size % nodes.trainer:
        return ()
    each = layout.world_size // nodes.trainer
    smaller = [layout.model_copy(update={"dp": dp}) for dp in range(layout.dp - 1, 0, -1)]
    return tuple(
        Fewer(found.world_size // each, found.dp)
        for found in smaller
        if found.world_size % each == 0
        and found.world_size // each >= nodes.trainer_least
        and not found.violations(config)
    )


def check_job_directory(what: str, path: str) -> None:
    """Raise UserError where NeMo-Run cannot keep jobs in `path`."""
    check_path(what, path)
    if path.split() != [path]:
        raise UserError(f"{what} is {path!r}, but NeMo-Run writes it without quotes; choose a path without blanks.")


def check_path(what: str, path: str) -> None:
    """Raise UserError where NeMo-Run would rewrite `path` in a job's script."""
    if _REWRITTEN in path:
        raise UserError(
            f"{what} is {path}, but NeMo-Run replaces every {_REWRITTEN} in a job's scripts by the job's directory; "
            "choose a path without it."
        )


def _wanted(config: RunConfig, nodes: Nodes) -> Iterator[tuple[str, int]]:
    """Yield kinds of servers that the config wants, with their own nodes."""
    if config.needs_sampling_servers:
        yield "policy", nodes.policy
    if config.has_ref_server:
        yield "ref", 0
    if config.needs_judge and config.judge.has_servers:
        yield "judge", nodes.judge


def _needed(component: Component, config: RunConfig) -> int:
    """GPUs of a node that the component uses."""
    if component.kind == "trainer":
        return ceil(config.policy.layout.world_size / component.nodes)
    if component.kind == "judge":
        server = config.judge.server
    else:
        server = {"policy": config.server, "ref": config.ref_server}[component.kind]
    return ceil(server.count / component.nodes) * server.tp


def _on_devices(component: Component, all_components: list[Component], config: RunConfig) -> Component:
    """Return the component with its share of the GPUs of nodes that others use too, in order."""
    sharing = [other for other in all_components if other.allocation == component.allocation]
    if len(sharing) == 1:
        return component
    before = sharing[: sharing.index(component)]
    if config.placement.kind == "colocated":
        # The sampling servers take turns with the trainer, which is always the first.
        before = [other for other in before if "policy" not in (other.kind, component.kind)]
    first = sum(_needed(other, config) for other in before)
    return replace(component, devices=tuple(range(first, first + _needed(component, config))))


def _violations(config: RunConfig, nodes: Nodes, found: list[Component]) -> Iterator[str]:
    if config.placement.kind == "colocated" and nodes.policy and config.needs_sampling_servers:
        yield f"nodes.policy is {nodes.policy}, but placement.kind is colocated, on the trainer's nodes; set it to 0."
    world = config.policy.layout.world_size
    if world % nodes.trainer:
        yield (
            f"nodes.trainer is {nodes.trainer}, which does not divide the {world} trainer processes of policy.layout; "
            "change one of them."
        )
    elif nodes.trainer_least and found[0].least != nodes.trainer_least:
        yield (
            f"nodes.trainer_least is {nodes.trainer_least}, which no number of replicas of policy.layout fills; the "
            f"fewest nodes from there on are {found[0].least}: set it to that, or to 0."
        )
    if nodes.trainer_least and (sharing := [other.kind for other in found[1:] if other.allocation == 0]):
        yield (
            f"nodes.trainer_least is {nodes.trainer_least}, but {' and '.join(sharing)} servers are on the trainer's "
            "nodes, and would have to do with fewer too; give them nodes of their own, or set it to 0."
        )
    for component in found if nodes.gpus else ():
        last = component.devices[-1] + 1 if component.devices else _needed(component, config)
        if last > nodes.gpus:
            yield (
                f"{component.kind} needs {last} GPUs of each of its {component.nodes} nodes, which have {nodes.gpus} "
                f"(nodes.gpus); give it more nodes, or make it smaller."
            )
