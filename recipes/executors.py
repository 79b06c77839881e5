"""NeMo-Run executors: `local`, `slurm` (from a login node) and `slurm_over_ssh`, and what a job makes of them.

One executor stands for the cluster: account, partition, time, container, mounts, srun flags. Every component of a job
gets a copy with its nodes and GPUs.
"""

import nemo_run as run
from nemo_run.config import get_nemorun_home

from exprl_megatron.errors import UserError
from recipes.places import Component, Nodes, check_job_directory, check_path
from recipes.scripts import around
from recipes.time_limits import SIGNAL, check_time_limit

RESTARTS = 20
"""How often a job that ran into its time limit, or was preempted, is queued again."""
# --overlap: components share nodes. --wait: none ends because another one's node is done. Threads go where they like.
_SRUN = ["--overlap", "--wait=0", "--cpu-bind=none"]


@run.cli.factory
def local() -> run.Config[run.LocalExecutor]:
    """This machine, one stage after the other."""
    return run.Config(run.LocalExecutor)


@run.cli.factory
def slurm() -> run.Config[run.SlurmExecutor]:
    """Slurm, from a machine that has sbatch and the cluster's file system; account and partition are to be set.

    Job files are in $NEMORUN_HOME (~/.nemo_run), which the nodes must see.
    """
    return _slurm(run.Config(run.LocalTunnel, job_dir=""))


@run.cli.factory
def slurm_over_ssh() -> run.Config[run.SlurmExecutor]:
    """Slurm, through ssh to a login node; set tunnel.host, tunnel.user and tunnel.job_dir, a directory there."""
    return _slurm(run.Config(run.SSHTunnel, host="", user="", job_dir=""))


def _slurm(tunnel: run.Config) -> run.Config[run.SlurmExecutor]:
    return run.Config(
        run.SlurmExecutor,
        account="",
        partition=None,
        time="04:00:00",
        signal=SIGNAL,
        exclusive=True,
        mem="0",
        tunnel=tunnel,
        poll_estimated_start_time=False,
        monitor_group_job_wait_time=5,
    )


def check_executor(executor: run.Executor) -> None:
    """Raise UserError where NeMo-Run 0.11 would submit something else than what `executor` says."""
    if isinstance(executor, run.LocalExecutor):
        return
    if not isinstance(executor, run.SlurmExecutor):
        raise UserError(f"run.executor is {executor.info()}; choose local, slurm or slurm_over_ssh.")
    if not executor.account:
        raise UserError("run.executor.account is empty; set it to the account that the job is charged to.")
    if executor.env_vars:
        # They would be exported without quotes, in upper case, and for all components.
        raise UserError(
            f"run.executor.env_vars sets {', '.join(executor.env_vars)}; use site.variables, or site.environment "
            "for the names of variables whose values are to be in no file."
        )
    check_time_limit(executor.time, executor.signal)
    check_job_directory("NEMORUN_HOME", get_nemorun_home())
    for mount in executor.container_mounts:
        check_path("run.executor.container_mounts", mount)
    _check_tunnel(executor.tunnel)


def _check_tunnel(tunnel: run.LocalTunnel | run.SSHTunnel) -> None:
    if isinstance(tunnel, run.LocalTunnel):
        if tunnel.job_dir:
            raise UserError(
                f"run.executor.tunnel.job_dir is {tunnel.job_dir}, but NeMo-Run copies nothing there for a local "
                "tunnel; leave it empty and set the environment variable NEMORUN_HOME."
            )
        return
    for name in ("host", "user", "job_dir"):
        if not getattr(tunnel, name):
            raise UserError(f"run.executor.tunnel.{name} is empty; set it.")
    check_job_directory("run.executor.tunnel.job_dir", tunnel.job_dir)


def component_executors(
    executor: run.SlurmExecutor, parts: list[Component], nodes: Nodes, workdir: str, shipped: run.Packager
) -> list[run.SlurmExecutor]:
    """Return a copy of `executor` for each component of a job, or one where all share the same nodes.

    `shipped` packs what the job finds in its directory; a container gets `workdir` mounted.
    """
    together = all(part.allocation == 0 for part in parts)
    found = []
    for part in parts[:1] if together else parts:
        copy = executor.clone()
        copy.nodes, copy.ntasks_per_node = part.nodes, 1
        if part.least < part.nodes:
            # Slurm gives as many as it has, after a node is lost perhaps fewer; given the tasks of a node, the fewest.
            copy.nodes, copy.ntasks_per_node = f"{part.least}-{part.nodes}", None
        # None would become --gpus-per-node=None beside another component's number.
        copy.gpus_per_node = nodes.gpus
        copy.srun_args = [*_SRUN, *(executor.srun_args or [])]
        copy.packager = shipped
        copy.setup_lines = "\n".join(filter(None, (executor.setup_lines, around(RESTARTS))))
        # Without it a stage waits for ever for one that has failed.
        copy.additional_parameters = {"kill_on_invalid_dep": "yes"} | (executor.additional_parameters or {})
        copy.wait_time_for_group_job = 0
        copy.heterogeneous = not together
        if copy.container_image is not None:
            copy.container_mounts = [*copy.container_mounts, *_mount(workdir, copy.container_mounts)]
        found.append(copy)
    if not together:
        found[0].het_group_indices = [part.allocation for part in parts]
    return found


def _mount(workdir: str, mounts: list[str]) -> list[str]:
    """Return the mount of `workdir`, where none of `mounts` shows it already."""
    inside = [mount.split(":")[1] if ":" in mount else mount for mount in mounts]
    seen = any(workdir == path or workdir.startswith(path.rstrip("/") + "/") for path in inside)
    return [] if seen else [f"{workdir}:{workdir}"]
