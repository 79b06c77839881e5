"""`exprl waterfall`: what the steps of a run spent their time on."""

import json as json_text
from pathlib import Path

from rich.console import Console

from exprl_megatron.errors import UserError
from exprl_megatron.reporting.picture_file import check_picture
from exprl_megatron.reporting.timeline import read_timeline
from exprl_megatron.reporting.waterfall import (
    bottleneck,
    draw_timeline,
    mean_phases,
    step_times,
    waterfall_table,
)
from exprl_megatron.runs.directory import RunDirectory, require_run


def show_waterfall(run: Path, stage: str | None, last: int, picture: Path | None, json: bool) -> None:
    """Print the phases of the last steps of a stage (None: of the run's latest), and draw them.

    Raises:
        UserError: the run has no such steps.
    """
    check_picture(picture)
    directory = RunDirectory(run)
    if not directory.timeline.is_file():
        require_run(run)
    spans = read_timeline(directory.timeline)
    times = step_times(spans)
    stage = stage or (times[-1].stage if times else None)
    chosen = [time for time in times if time.stage == stage][-last:]
    if not times:
        raise UserError(f"{run} has finished no step yet; wait for one.")
    if not chosen:
        known = ", ".join(dict.fromkeys(time.stage for time in times))
        raise UserError(f"{run} has no finished step of stage {stage}; it has steps of {known}.")
    phases = mean_phases(chosen)
    title = f"{stage}, steps {chosen[0].step} to {chosen[-1].step}"
    if json:
        steps = [{"step": time.step, **time.phases} for time in chosen]
        print(json_text.dumps({"stage": stage, "mean": phases, "bottleneck": bottleneck(phases), "steps": steps}))
    else:
        Console().print(waterfall_table(phases, title))
        print(bottleneck(phases))
        others = [name for name in dict.fromkeys(time.stage for time in times) if name != stage]
        if others:
            print(f"This is stage {stage}; --stage shows {' or '.join(others)}.")
    if picture is not None:
        wanted = {time.step for time in chosen}
        draw_timeline([span for span in spans if span.stage == stage and span.step in wanted], title, picture)
