"""`exprl report` on the command line."""

from pathlib import Path
from typing import Annotated

import typer

from exprl_megatron.errors import UserError


def report_command(
    runs: Annotated[list[Path], typer.Argument(help="Directories of runs, which may still be running.")],
    out: Annotated[Path | None, typer.Option(help="Write the page to this file, F.html.")] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve the page on this machine instead; it refreshes itself.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port for --serve; 0 takes a free one.")] = 0,
    without_references: Annotated[
        bool,
        typer.Option(
            "--without-references",
            help="Leave out references and all that quotes them: judge prompts, rubrics, words of judge and verifier.",
        ),
    ] = False,
    max_mb: Annotated[float, typer.Option("--max-mb", min=1, help="Maximum size of the file, MB.")] = 20.0,
) -> None:
    """Make one self-contained page about runs: curves, traces, the judge's health, where the time goes."""
    from exprl_megatron.runs.directory import require_run

    if (out is None) == (not serve):
        raise UserError("No output is named; give --out F.html, or --serve.")
    if out is not None and out.is_dir():
        raise UserError(f"{out} is a directory; give --out the path of a file, F.html.")
    for run in runs:
        require_run(run)
    from exprl_megatron.inspection.report_page.page_model import PageReader

    reader = PageReader(runs, references=not without_references)
    if out is None:
        from exprl_megatron.inspection.report_page.page_server import serve_page

        serve_page(reader, port)
        return
    from exprl_megatron.inspection.report_page.page_file import write_page

    print(f"reading {', '.join(map(str, runs))}", flush=True)
    model = write_page(out, reader, int(max_mb * 1e6))
    places = [place for run in model.tree["runs"] for place in run["places"]]
    kept, of = (sum(place.get(name, 0) for place in places) for name in ("kept", "traces"))
    texts = f"{kept} of {of} traces with their texts" if of else "no traces yet"
    shown = "with references" if not without_references else "without references"
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {texts}, {shown}")
