"""`exprl eval` on the command line."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from exprl_megatron.errors import UserError

if TYPE_CHECKING:
    from exprl_megatron.config.run import RunConfig
    from exprl_megatron.evaluation.eval_config import EvalConfig

DEFAULT_K = (1, 4, 16, 128)
PAIRS = "NAME=VALUE, may be given several times."


def eval_command(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="A model's directory in Hugging Face form.")],
    problems: Annotated[str, typer.Option(help="Problems: a JSON-lines or Parquet file, a directory, or a hub name.")],
    config: Annotated[
        Path | None, typer.Option(help="A run's YAML or directory: verify by its verifier.domains (docs/extending.md).")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples for each problem.")] = 16,
    k: Annotated[
        str | None,
        typer.Option(help="Values of k for pass@k, for example 1,4,16. (default: those of 1,4,16,128 up to --samples)"),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Sampling temperature.")] = 0.8,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longer samples are cut off. (default: 16384, without a GPU 512)")
    ] = None,
    top_p: Annotated[float, typer.Option(help="Share of probability to sample from (nucleus).")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Number of likeliest tokens to sample from; -1 is all.")] = -1,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    user: Annotated[str, typer.Option(help="User message; {problem} stands for the problem.")] = "{problem}",
    template_arg: Annotated[list[str] | None, typer.Option(help=f"Argument of the chat template: {PAIRS}")] = None,
    field: Annotated[list[str] | None, typer.Option(help=f"Other names of the problems' fields: {PAIRS}")] = None,
    split: Annotated[str, typer.Option(help="Split of a directory or hub name.")] = "train",
    limit: Annotated[int | None, typer.Option(min=1, help="Use only this many problems, the first ones.")] = None,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Problems with longer prompts are left out.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same samples.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Directory to keep and resume in. (default: runs/eval/...)")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
    json_file: Annotated[Path | None, typer.Option(help="Write the figures to this file too.")] = None,
    keep_unsolved: Annotated[Path | None, typer.Option(help="Write the problems that no sample solved.")] = None,
    max_solve_rate: Annotated[
        float, typer.Option(min=0, max=1, help="Largest share of right samples at which a problem counts as unsolved.")
    ] = 0.0,
    dtype: Annotated[
        str, typer.Option(help="Number format of the server: float32, bfloat16, float16, or auto.")
    ] = "auto",
    server_count: Annotated[int, typer.Option(min=1, help="Number of servers.")] = 1,
    server_tp: Annotated[int, typer.Option(min=1, help="Devices of one server (tensor parallelism).")] = 1,
    server_port: Annotated[int | None, typer.Option(help="Port of the first server. (default: free ports)")] = None,
    server_arg: Annotated[
        list[str] | None, typer.Option(help="Argument that is passed to SGLang unchanged; may be repeated.")
    ] = None,
    request_deadline_s: Annotated[
        float, typer.Option(help="Seconds for one sample, including its wait in the queue.")
    ] = 3600.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Samples in flight at one server.")] = 1024,
    verifier_workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that verify answers. (default: one per core, at most 8)")
    ] = None,
    verifier_deadline_s: Annotated[float, typer.Option(help="Seconds for the verification of one answer.")] = 10.0,
    program_deadline_s: Annotated[float, typer.Option(help="Seconds for all tests of one program.")] = 120.0,
) -> None:
    """Measure pass@k of a model; an evaluation that was interrupted continues where it stopped."""
    if context.args:
        words = " ".join(context.args)
        hint = f"--json prints and takes no file; use --json-file {words}" if json else "leave it out"
        raise UserError(f"The arguments `{words}` are unknown; {hint}.")
    run = None if config is None else _run_config(config)
    settings = _settings(
        model=str(model),
        problems={
            "domains": () if run is None else run.custom_domains,
            "source": problems,
            "split": split,
            "fields": _pairs(field),
            "limit": limit,
            "max_prompt_tokens": max_prompt_tokens,
        },
        directory=str(out or Path("runs", "eval", f"{model.resolve().name}-{Path(problems).stem}")),
        samples=samples,
        k=_ks(k, samples),
        sampling={
            "temperature": temperature,
            "max_new_tokens": max_new_tokens or _max_new_tokens(model),
            "top_p": top_p,
            "top_k": top_k,
        },
        prompt={"system": system, "user": user, "template_args": _pairs(template_arg)},
        seed=seed,
        dtype=_dtype(dtype),
        server={
            "count": server_count,
            "tp": server_tp,
            "port": server_port,
            "extra_args": server_arg or [],
            "request_deadline_s": request_deadline_s,
        },
        concurrency=concurrency,
        verifier_workers=verifier_workers or "auto",
        verifier_deadline_s=verifier_deadline_s,
        program_deadline_s=program_deadline_s,
        verifiers={} if run is None else run.verifier.domains,
        plugin_path=() if run is None else run.plugin_path,
    )
    _run(settings, json, json_file, (keep_unsolved, max_solve_rate))


def _run_config(path: Path) -> "RunConfig":
    """Read a run's config from its YAML file or from its directory."""
    from exprl_megatron.config.load import load_config
    from exprl_megatron.runs.directory import RunDirectory, read_config

    return read_config(RunDirectory(path)) if path.is_dir() else load_config(path, [])


def _run(settings: "EvalConfig", as_json: bool, json_file: Path | None, unsolved: tuple[Path | None, float]) -> None:
    """Evaluate, print and write; with `as_json` JSON alone is on stdout, and all else on stderr."""
    from rich.console import Console

    from exprl_megatron.evaluation.eval_report import record_text, result_lines, result_table, write_unsolved
    from exprl_megatron.evaluation.evaluate import evaluate
    from exprl_megatron.utils.files import write_atomically

    terminal = Console(stderr=as_json)
    keep_unsolved, max_solve_rate = unsolved

    def log(text: str) -> None:
        terminal.print(text, markup=False, highlight=False, soft_wrap=True)

    try:
        evaluation = evaluate(settings, log)
    except UserError as error:
        # A run's config has this key; here it is an option.
        raise UserError(str(error).replace("set problems.fields.", "use --field ")) from error
    terminal.print(result_table(settings, evaluation))
    for line in result_lines(settings, evaluation):
        log(line)
    log(f"samples and counts: {settings.directory}")
    if as_json:
        print(record_text(settings, evaluation), end="")
    if json_file is not None:
        write_atomically(json_file, record_text(settings, evaluation).encode())
        log(f"figures: {json_file}")
    if keep_unsolved is not None:
        log(f"{write_unsolved(keep_unsolved, evaluation, max_solve_rate)} unsolved problems: {keep_unsolved}")


def _settings(**tree: Any) -> "EvalConfig":
    from pydantic import ValidationError

    from exprl_megatron.evaluation.eval_config import EvalConfig

    try:
        return EvalConfig.model_validate(tree)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc']))} is {e['input']!r}: {e['msg']}." for e in error.errors()]
        raise UserError("\n".join(faults)) from error


def _ks(text: str | None, samples: int) -> tuple[int, ...]:
    if text is None:
        return tuple(k for k in DEFAULT_K if k <= samples)
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"--k is {text!r}; write numbers with commas between them, for example 1,4,16.") from error


def _pairs(texts: list[str] | None) -> dict[str, Any]:
    import yaml

    found = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"{text!r} is not NAME=VALUE; put an equals sign between the two.")
        found[name] = yaml.safe_load(value)
    return found


def _max_new_tokens(model: Path) -> int:
    """Return at most half of the model's positions: long on GPUs, short enough on a CPU that a first try ends."""
    from exprl_megatron.models.architecture import read_architecture
    from exprl_megatron.utils.accelerator import uses_cuda

    longest = 16384 if uses_cuda() else 512
    if not (model / "config.json").is_file():
        # The model is refused later, in its own sentence.
        return longest
    return min(longest, read_architecture(model).max_positions // 2)


def _dtype(name: str) -> str:
    from exprl_megatron.utils.accelerator import uses_cuda

    return name if name != "auto" else "bfloat16" if uses_cuda() else "float32"
