"""Submits the runs of an experiment as NeMo-Run jobs, one after the other, and tells how they ended."""

import contextlib
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import fiddle as fdl
import nemo_run as run

from exprl_megatron.config.run import RunConfig
from exprl_megatron.errors import RunStopped, UserError
from exprl_megatron.launch.dry_run import print_differences_from_released, print_prompts
from exprl_megatron.launch.launcher import check_server_start
from exprl_megatron.launch.preflight import dry_run
from exprl_megatron.models.architecture import layout_violations, read_architecture
from exprl_megatron.utils.files import write_atomically
from recipes import scripts
from recipes.executors import check_executor, component_executors
from recipes.places import Nodes, Site, components
from recipes.scripts import RESOLVED, Place
from recipes.trees import as_yaml


@dataclass(frozen=True)
class Job:
    """One run of an experiment."""

    name: str
    config: RunConfig
    nodes: Nodes


def launch(
    recipe: run.Partial, executor: run.Executor | run.Config | None = None, dryrun: bool = False, detach: bool = False
) -> None:
    """Run what a recipe's factory returned; without an executor on this machine. For the rest see `submit`."""
    ctx = run.cli.RunContext(name=recipe.__fn_or_cls__.__name__, dryrun=dryrun, detach=detach)
    ctx.executor = fdl.build(executor) if isinstance(executor, run.Config) else executor
    fdl.build(recipe)(ctx=ctx)


def submit(ctx: run.cli.RunContext, jobs: list[Job], site: Site, resume: bool) -> None:
    """Run `jobs` with the executor of `ctx`, each once the one before has succeeded.

    The experiment has the name of `ctx`. With ctx.dryrun the scripts are printed instead; with ctx.detach jobs on Slurm
    go on without this process.
    Raises UserError, before anything is submitted, where they could not run; RunStopped where a job has failed.
    """
    _check_name(ctx.name)
    executor = ctx.executor or run.LocalExecutor()
    here = isinstance(executor, run.LocalExecutor)
    check_executor(executor)
    site = _filled(site, executor)
    _check_layouts(jobs, site)
    if ctx.dryrun:
        _check_starts(jobs, site, here)
    with tempfile.TemporaryDirectory() as written, run.Experiment(ctx.name, enable_goodbye_message=False) as experiment:
        before = None
        for job in jobs:
            if here:
                _add_local(experiment, executor, job, site, resume, before)
            else:
                _add_slurm(experiment, executor, job, site, resume, before, Path(written) / job.name)
            before = job.name
        if ctx.dryrun:
            _print_scripts(experiment)
            return
        for job in jobs if here else ():
            _write_config(_run_directory(job, site), job, resume)
        experiment.run(detach=ctx.detach, tail_logs=ctx.tail_logs)
    if here or not ctx.detach:
        require_success(experiment)


def _check_name(name: str) -> None:
    """Check that an experiment's name, which NeMo-Run makes a directory and part of scripts of, is a plain word.

    Raises:
        UserError: it is not.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise UserError(
            f"--name is {name!r}, which is to be a directory's name; use letters, digits, '_', '.' and '-'."
        )


def outcomes(experiment: run.Experiment) -> dict[str, str]:
    """NeMo-Run's word for every job, as SUCCEEDED, FAILED or RUNNING; CANCELLED where one before it has failed."""
    states = {name: job["status"].name for name, job in experiment.status(return_dict=True).items()}
    found: dict[str, str] = {}
    for job in experiment.jobs:
        cancelled = any(found[name] in ("FAILED", "CANCELLED") for name in job.dependencies)
        found[job.id] = "CANCELLED" if cancelled else states[job.id]
    return found


def require_success(experiment: run.Experiment) -> None:
    """Raise RunStopped where a job of an experiment that has ended did not succeed; NeMo-Run says nothing then."""
    found = outcomes(experiment)
    if set(found.values()) != {"SUCCEEDED"}:
        ends = ", ".join(f"{name}: {state}" for name, state in found.items())
        raise RunStopped(
            f"The experiment {experiment._id} did not succeed ({ends}); "
            f"see `python -m recipes logs {experiment._id}`, and go on with resume=True."
        )


def _filled(site: Site, executor: run.Executor) -> Site:
    """Return the site with its directory, and checked as far as this machine knows."""
    remote = isinstance(executor, run.SlurmExecutor) and isinstance(executor.tunnel, run.SSHTunnel)
    if remote and not site.workdir:
        raise UserError("site.workdir is empty; set it to the directory of the checkout on the cluster.")
    missing = [name for name in site.environment if name not in os.environ]
    if missing and not remote:
        raise UserError(f"{', '.join(missing)} of site.environment is not set here; export it before you submit.")
    return replace(site, workdir=site.workdir if remote else str(Path(site.workdir).absolute()))


def _check_layouts(jobs: list[Job], site: Site) -> None:
    """Raise UserError where the model does not allow a job's layout, as far as the model can be seen from here.

    What later jobs start from has the form of what the first one starts from.
    """
    model = Path(site.workdir) / jobs[0].config.policy.model
    if not (model / "config.json").is_file():
        return
    architecture = read_architecture(model)
    found = [
        f"{job.name}: {sentence}"
        for job in jobs
        for sentence in layout_violations(architecture, job.config.policy.layout)
    ]
    if found:
        raise UserError("\n".join(found))


def _check_starts(jobs: list[Job], site: Site, here: bool) -> None:
    """Check what each job's start will check, and print its prompts, as far as its models can be read from here.

    GPUs and ports are those of this machine, and are checked where the jobs run `here`.
    """
    if not Path(site.workdir).is_dir():
        return
    with contextlib.chdir(site.workdir):
        for job in jobs:
            print_differences_from_released(job.config)
            if (left_out := dry_run(job.config)) is None:
                if here:
                    check_server_start(job.config)
                print_prompts(job.config)
            else:
                print(f"{job.name}: {left_out}", file=sys.stderr)


def _add_local(
    experiment: run.Experiment, executor: run.LocalExecutor, job: Job, site: Site, resume: bool, before: str | None
) -> None:
    place = Place(job.config.directory, site)
    place.check()
    task = run.Script(inline=scripts.local(place, resume, before), metadata=_metadata("trainer and servers", job, site))
    experiment.add(task, executor=executor, name=job.name, dependencies=[before] if before else None)


def _add_slurm(
    experiment: run.Experiment,
    executor: run.SlurmExecutor,
    job: Job,
    site: Site,
    resume: bool,
    before: str | None,
    shipped: Path,
) -> None:
    """`shipped` is a directory to be made: what is in it, the config, comes with the job."""
    place = Place(job.config.directory, site, executor.container_image is not None)
    place.check()
    parts = components(job.config, job.nodes)
    shipped.mkdir()
    (shipped / RESOLVED).write_text(as_yaml(job.config))
    packager = run.PatternPackager(include_pattern=str(shipped / RESOLVED), relative_path=str(shipped))
    tasks = [
        run.Script(
            inline=scripts.trainer(place, part, resume) if part.kind == "trainer" else scripts.servers(place, part),
            metadata=_metadata(part.kind, job, site),
        )
        for part in parts
    ]
    executors = component_executors(executor, parts, job.nodes, site.workdir, packager)
    experiment.add(
        tasks,
        executor=executors if len(executors) > 1 else executors[0],
        name=job.name,
        dependencies=[before] if before else None,
    )


def _metadata(component: str, job: Job, site: Site) -> dict[str, str]:
    """Return what `logs` reads again."""
    return {"component": component, "run": str(_run_directory(job, site))}


def _run_directory(job: Job, site: Site) -> Path:
    return Path(site.workdir) / job.config.directory


def _write_config(directory: Path, job: Job, resume: bool) -> None:
    """Write the config into the run's directory, unless another run is there."""
    if (directory / "config.yaml").is_file() and not resume:
        raise UserError(f"The directory {directory} already holds a run; go on with resume=True, or choose another.")
    write_atomically(directory / RESOLVED, as_yaml(job.config).encode())


def _print_scripts(experiment: run.Experiment) -> None:
    """Print what would run: the batch scripts, and the script of every component."""
    experiment.dryrun(log=False, delete_exp_dir=False)
    root = Path(experiment._exp_dir)
    try:
        for file in [*sorted(root.glob("*_sbatch.sh")), *sorted(root.glob("*/scripts/*.sh"))]:
            print(f"# {'=' * 8} {file.relative_to(root)}\n{file.read_text().strip()}\n")
    finally:
        shutil.rmtree(root)
