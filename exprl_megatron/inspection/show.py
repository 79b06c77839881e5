"""`exprl show`: the groups and traces of a run on a terminal."""

import json
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from exprl_megatron.config.run import RunConfig
from exprl_megatron.errors import UserError
from exprl_megatron.inspection.rollout_steps import InspectedGroup, evaluation_groups, logged_groups, logged_steps
from exprl_megatron.inspection.rollout_tables import group_table
from exprl_megatron.inspection.selection import SelectedGroup, Selection, select
from exprl_megatron.inspection.show_records import group_record
from exprl_megatron.inspection.trace_text import Boundaries, PolicyTokenizer, trace_panels
from exprl_megatron.plugins.loading import use_plugin_path
from exprl_megatron.runs.directory import RunDirectory, read_config


def show_steps(
    run: Path, stage: str | None, step: int | None, selection: Selection, limit: int, text: bool, as_json: bool
) -> None:
    """Print groups of the rollout log: of one step, or of all where a problem or abstentions are looked for.

    Raises UserError where the run, the step or what is looked for is not there.
    """
    directory = RunDirectory(run)
    config = read_config(directory)
    use_plugin_path(config.plugin_path)
    every = selection.problem is not None or selection.abstained
    steps = logged_steps(directory, config, stage, step, every)

    def groups() -> Iterator[InspectedGroup]:
        for name, number in steps:
            yield from logged_groups(directory, config, name, number)

    chosen = select(groups(), selection)
    first, last = (f"{name}, step {number}" for name, number in (steps[0], steps[-1]))
    _print(chosen, first if first == last else f"{first} to {last}", config, limit, text, as_json)


def show_evaluation(run: Path, name: str, selection: Selection, limit: int, text: bool, as_json: bool) -> None:
    """Print groups of held-out answers of the evaluation `name`; raises UserError as show_steps."""
    directory = RunDirectory(run)
    config = read_config(directory)
    use_plugin_path(config.plugin_path)
    chosen = select(evaluation_groups(directory, name), selection)
    _print(chosen, f"evaluation {name}", config, limit, text, as_json)


def _print(chosen: list[SelectedGroup], where: str, config: RunConfig, limit: int, text: bool, as_json: bool) -> None:
    if not chosen:
        raise UserError(f"No trace of {where} is as asked for; leave out --problem, --sample or --abstained.")
    shown = chosen[:limit]
    if as_json:
        print(json.dumps({"groups": [group_record(each) for each in shown], "found": len(chosen)}, indent=2))
        return
    console = Console(highlight=False)
    boundaries = PolicyTokenizer(config.policy.model).boundaries
    for each in shown:
        console.print(group_table(each))
        if text:
            _print_texts(console, each, boundaries)
    if len(chosen) > len(shown):
        console.print(f"{len(shown)} of {len(chosen)} groups; --limit shows more.")


def _print_texts(console: Console, selected: SelectedGroup, boundaries: Boundaries) -> None:
    advantages = selected.inspected.advantages
    for place in selected.places:
        own = None if advantages is None else advantages[place]
        sample = selected.inspected.group.samples[place]
        console.print(trace_panels(sample, advantages is not None, own, boundaries))
