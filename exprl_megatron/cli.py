"""The console command `exprl`."""

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from exprl_megatron.commands.eval_command import eval_command
from exprl_megatron.commands.plan_command import plan_command
from exprl_megatron.commands.report_command import report_command
from exprl_megatron.commands.show_command import show_command
from exprl_megatron.errors import Preempted, RunStopped, ServerError, UserError, exit_status, storage_sentence
from exprl_megatron.processes.interruption import Interrupted, end_on_signals

if TYPE_CHECKING:
    from exprl_megatron.config.run import RunConfig

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


class ServersFrom(StrEnum):
    """Who starts the servers of a run."""

    OWN = "own"
    REGISTERED = "registered"


class ServerKind(StrEnum):
    """What servers are for: sampling, judging, or scoring the reference policy."""

    POLICY = "policy"
    JUDGE = "judge"
    REF = "ref"


def _print_version(wanted: bool) -> None:
    if wanted:
        from exprl_megatron.version import this_build

        print(this_build())
        raise typer.Exit


@app.callback()
def exprl(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print version and commit.")
    ] = False,
) -> None:
    """ExpRL mid-training and the sparse-reward RL after it, on Megatron-Core and SGLang."""


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A run's YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, for example stages.0.steps=3")] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check all that a start checks; print config, processes and one problem's prompts."
        ),
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the run's last complete checkpoint.")] = False,
    servers: Annotated[
        ServersFrom, typer.Option(help="Start the servers here, or wait for those that `exprl serve` registers.")
    ] = ServersFrom.OWN,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes that share the trainer's processes.")] = 1,
    node_rank: Annotated[
        int | None, typer.Option(min=0, help="This node's number, from 0; node 0 has the controller rank.")
    ] = None,
    master: Annotated[str | None, typer.Option(help="Address of node 0 and a free port there, HOST:PORT.")] = None,
    check: Annotated[
        bool, typer.Option("--assert", help="Stop where values that must agree do not (debug.assertions=true).")
    ] = False,
) -> None:
    """Run the stages of a config, one after the other."""
    run: RunConfig | None = None
    try:
        from exprl_megatron.config.load import load_config
        from exprl_megatron.launch.launcher import check_server_start, launch
        from exprl_megatron.launch.model_checks import model_violations
        from exprl_megatron.launch.nodes import Node
        from exprl_megatron.launch.worker_launcher import run_worker_node

        changes = [*(overrides or []), *(["debug.assertions=true"] if check else [])]
        if dry_run:
            from exprl_megatron.launch.dry_run import print_start

            # Registered servers, and those of a run of several nodes, are placed elsewhere.
            here = servers is ServersFrom.OWN and nodes == 1
            print_start(load_config(config, changes), **({"check_servers": check_server_start} if here else {}))
            return
        node = Node.from_options(node_rank, nodes, master)
        registered = servers is ServersFrom.REGISTERED
        if nodes > 1 and not registered:
            raise UserError(
                f"--nodes is {nodes}, but servers of one node are not reached by others; add --servers registered."
            )
        run = load_config(config, changes, model_violations)
        if node.number > 0:
            run_worker_node(run, node)
        else:
            launch(run, resume, registered, node)
    except Interrupted as interrupted:
        raise Interrupted(interrupted.number, _advice(run)) from None


def _advice(run: "RunConfig | None") -> str:
    """Return what to type after an interruption; `run` is None where no config of one had been read."""
    words = ["exprl", *sys.argv[1:]]
    if run is not None and (Path(run.directory) / "config.yaml").is_file() and "--resume" not in words:
        words.append("--resume")
    return f"continue with `{shlex.join(words)}`"


@app.command()
def serve(
    config: Annotated[Path, typer.Argument(help="A run's YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value")] = None,
    kind: Annotated[ServerKind, typer.Option(help="Which servers of the run to start.")] = ServerKind.POLICY,
    node_rank: Annotated[int | None, typer.Option(min=0, help="This node's number. (default: Slurm's, else 0)")] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Nodes that share the servers. (default: Slurm's, else 1)")
    ] = None,
) -> None:
    """Keep this machine's share of a run's servers, for `exprl train --servers registered`, until the run has ended."""
    from exprl_megatron.config.load import load_config
    from exprl_megatron.launch.serve import ServerShare, serve

    serve(load_config(config, overrides or []), kind.value, ServerShare.from_slurm(node_rank, nodes))


@app.command("judge-bench")
def judge_bench(
    config: Annotated[Path, typer.Argument(help="A run's YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value")] = None,
    traces: Annotated[
        Path | None, typer.Option(help="Judged traces as JSON lines. (default: those of judge.gate)")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only this many traces, the first ones.")] = None,
    repeats: Annotated[int, typer.Option(min=0, help="How many more times to judge each trace, with sampling.")] = 2,
    champ: Annotated[bool, typer.Option("--champ", help="Score the first wrong steps in CHAMP instead.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
    json_file: Annotated[Path | None, typer.Option(help="Write the figures to this file too.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the three arms to F.png, F.svg or F.pdf.")] = None,
) -> None:
    """Measure how far a config's judge can be trusted: with the right reference, none and a wrong one."""
    from exprl_megatron.config.load import load_config
    from exprl_megatron.evaluation.judge_bench import BenchOutput, bench_judge, bench_judge_on_champ

    output = BenchOutput(json, json_file, picture)
    if json and (files := [word for word in overrides or [] if "=" not in word]):
        raise UserError(f"--json prints and takes no file; write the figures with --json-file {files[0]}.")
    run_config = load_config(config, overrides or [])
    if champ:
        if traces is not None or picture is not None:
            raise UserError("--champ has its own traces and no picture; leave --traces and --picture out.")
        bench_judge_on_champ(run_config, limit, output)
        return
    bench_judge(run_config, traces, limit, repeats, output)


app.command("eval", context_settings={"allow_extra_args": True})(eval_command)
app.command("plan")(plan_command)
app.command("show")(show_command)
app.command("report")(report_command)


@app.command()
def judgement(
    hash: Annotated[
        str | None,
        typer.Argument(help="Six or more of its first digits. Without a hash the latest entries are listed."),
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Directory of a run with a judge.")] = None,
    store: Annotated[Path | None, typer.Option(help="File that judge.store names.")] = None,
    stage: Annotated[
        str | None, typer.Option(help="List judgements of this stage, from the rollout log of --run.")
    ] = None,
    step: Annotated[int | None, typer.Option(min=1, help="List judgements of this step.")] = None,
    problem: Annotated[str | None, typer.Option(help="List judgements of this problem id.")] = None,
    score: Annotated[
        str | None, typer.Option(help="List judgements with this score, or in a range such as 0.25:0.75.")
    ] = None,
    abstained: Annotated[bool, typer.Option("--abstained", help="List only abstentions.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of entries.")] = 20,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Show what the judge, or the builder of a rubric, was asked and what it answered."""
    from exprl_megatron.runs.directory import require_run

    if run is not None:
        require_run(run)
    from exprl_megatron.inspection.stored_judgements import show_judgement

    if not abstained and (stage, step, problem, score) == (None,) * 4:
        show_judgement(hash, run, store, json, limit)
        return
    from exprl_megatron.inspection.judgement_list import JudgementFilter, list_judgements, score_range

    if run is None or hash is not None or store is not None:
        raise UserError("Conditions look through the rollout log of a run; give --run DIR, and no hash and no --store.")
    found = JudgementFilter(stage, step, problem, None if score is None else score_range(score), abstained)
    list_judgements(run, found, limit, json)


@app.command()
def waterfall(
    run: Annotated[Path, typer.Argument(help="A run's directory.")],
    stage: Annotated[str | None, typer.Option(help="Stage to summarize. (default: the latest)")] = None,
    last: Annotated[int, typer.Option(min=1, help="How many of its last steps to average.")] = 20,
    picture: Annotated[Path | None, typer.Option(help="Draw the timeline to F.png, F.svg or F.pdf.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Show what a run's steps spend their time on, and which part is the bottleneck."""
    from exprl_megatron.inspection.run_waterfall import show_waterfall

    show_waterfall(run, stage, last, picture, json)


@app.command("leak-scan")
def leak_scan(
    run: Annotated[Path, typer.Argument(help="A run's directory.")],
    canary: Annotated[str | None, typer.Option(help="Text to look for instead of leak_guard.canary.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Search a run's saved rollouts for references; exit status 1 if one has leaked."""
    from exprl_megatron.runs.directory import require_run

    require_run(run)
    from exprl_megatron.inspection.leak_scan import report_leaks

    if report_leaks(run, canary, json):
        raise typer.Exit(1)


@app.command()
def doctor(
    target: Annotated[
        str | None, typer.Argument(help="A run's YAML or a recipe (llama3p3_70b), whose needs are checked too.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
    gpus: Annotated[bool, typer.Option("--gpus", help="Also require what a node with GPUs needs.")] = False,
) -> None:
    """List what this machine has and what each missing part prevents; exit status 1 if an essential part is missing."""
    from exprl_megatron.commands.doctor import examine, lacking, print_findings
    from exprl_megatron.commands.run_needs import needs_of

    findings = [*examine(), *([] if target is None else needs_of(target))]
    print_findings(findings, as_json=json)
    if missing := lacking(findings, gpus):
        print(f"exprl: {', '.join(missing)} missing; the table says what for.", file=sys.stderr)
        raise typer.Exit(1)


def main() -> None:
    """Run the command line; how a command ended early is one line on stderr and an exit status that names the cause."""
    end_on_signals()
    try:
        app()
    except (UserError, ServerError, RunStopped, Preempted) as error:
        print(f"exprl: {error}", file=sys.stderr)
        sys.exit(exit_status(error))
    except Interrupted as error:
        error.advice = error.advice or _advice(None)
        print(f"exprl: {error}", file=sys.stderr)
        sys.exit(error.code)
    except OSError as error:
        if (sentence := storage_sentence(error)) is None:
            raise
        print(f"exprl: {sentence}", file=sys.stderr)
        sys.exit(exit_status(error))


if __name__ == "__main__":
    main()
