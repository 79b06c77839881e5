"""Converts weights between Hugging Face form and Megatron's torch_dist files; see docs/conversion.md.

python tools/convert_checkpoint.py to-megatron MODEL TARGET
python tools/convert_checkpoint.py to-hf RUN TARGET --dtype fp8
python tools/convert_checkpoint.py verify ORIGIN COPY
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from exprl_megatron.errors import UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Target = Annotated[Path, typer.Argument(help="The directory to write; it appears when it is whole.")]
Size = Annotated[float, typer.Option(min=1e-6, help="Size of one file in 10^9 bytes.")]
Origin = Annotated[Path | None, typer.Option(help="config.json and tokenizer for a checkpoint; else its run's model.")]


@app.command("to-megatron")
def to_megatron(
    source: Annotated[Path, typer.Argument(help="A model directory in Hugging Face form.")],
    target: Target,
    dtype: Annotated[Literal["keep", "bf16", "fp32"], typer.Option(help="Dtype of the written weights.")] = "keep",
    file_gb: Size = 5.0,
) -> None:
    """Write a directory that any layout loads (`policy.model`)."""
    from exprl_megatron.conversion.to_megatron import convert_to_megatron
    from exprl_megatron.policy.model import DTYPES

    with _progress("to-megatron") as (progress, advance):
        convert_to_megatron(source, target, DTYPES.get(dtype), int(file_gb * 1e9), advance)
    progress.console.print(f"{target} is complete.")


@app.command("to-hf")
def to_hf(
    source: Annotated[Path, typer.Argument(help="A converted directory, a checkpoint, or a run: its newest one.")],
    target: Target,
    origin: Origin = None,
    dtype: Annotated[Literal["keep", "bf16", "fp32", "fp8"], typer.Option(help="fp8: blocks of 128 x 128.")] = "keep",
    file_gb: Size = 5.0,
) -> None:
    """Write a model directory in Hugging Face form."""
    from exprl_megatron.conversion.to_hf import convert_to_huggingface
    from exprl_megatron.conversion.weights import open_weights
    from exprl_megatron.policy.model import DTYPES

    form = "fp8" if dtype == "fp8" else DTYPES.get(dtype)
    with _progress("to-hf") as (progress, advance):
        convert_to_huggingface(open_weights(source, origin), target, form, int(file_gb * 1e9), advance)
    progress.console.print(f"{target} is complete.")


@app.command()
def verify(
    reference: Annotated[Path, typer.Argument(help="The model from which the other was made, in any form.")],
    copy: Annotated[Path, typer.Argument(help="The model to verify, in any form.")],
    origin: Origin = None,
    logits: Annotated[
        Literal["auto", "yes", "no"], typer.Option(help="Run both models; auto: where memory allows.")
    ] = "auto",
    report: Annotated[Path | None, typer.Option("--json", help="Write every tensor's hash to this file.")] = None,
) -> None:
    """Compare every tensor, and the models' logits. The exit status is 1 where anything differs."""
    from exprl_megatron.conversion.verify import verify_weights

    with _progress("verify") as (progress, advance):
        found = verify_weights(reference, copy, origin, logits, advance)
    if report is not None:
        report.write_text(json.dumps(found.hashes, indent=2) + "\n", encoding="utf-8")
    for line in found.lines():
        progress.console.print(line, highlight=False, soft_wrap=True)
    if not found.equal:
        raise typer.Exit(1)


class _progress:
    """A bar of bytes on the terminal's error stream."""

    def __init__(self, what: str):
        columns = TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task(what, total=None)

    def __enter__(self):
        return self._progress, self._advance

    def __exit__(self, *exception) -> None:
        # Where there is no terminal, a bar that has not started ends with an empty line.
        if self._progress.live.is_started:
            self._progress.stop()

    def _advance(self, done: int, total: int) -> None:
        # Not before there is something to do: what is refused gets no empty bar.
        self._progress.start()
        self._progress.update(self._task, completed=done, total=total)


def main() -> None:
    """The command line: a UserError is one line and status 2."""
    try:
        app()
    except UserError as error:
        print(f"exprl: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
