"""`exprl show`: the groups and traces of a run on a terminal."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from exprl_megatron.config.run import RunConfig
from exprl_megatron.errors import UserError
from exprl_megatron.inspection.rollout_steps import InspectedGroup, evaluation_groups, logged_groups, logged_steps
from exprl_megatron.inspection.rollout_tables import group_table
from exprl_megatron.inspection.selection import SelectedGroup, Selection, select
from exprl_megatron.inspection.show_records import group_to_dict
from exprl_megatron.inspection.token_gaps import token_gap_table
from exprl_megatron.inspection.trace_text import Boundaries, PolicyTokenizer, trace_panels
from exprl_megatron.plugins.loading import use_plugin_path
from exprl_megatron.runs.directory import RunDirectory, read_config


@dataclass(frozen=True)
class DisplayOptions:
    """How much of the groups is printed, and in which form."""

    limit: int
    """Groups at most."""
    text: bool = False
    tokens: bool = False
    """The log-probs of single tokens."""
    as_json: bool = False


def show_steps(run: Path, stage: str | None, step: int | None, selection: Selection, shown: DisplayOptions) -> None:
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
    _print(chosen, first if first == last else f"{first} to {last}", config, shown)


def show_evaluation(run: Path, name: str, selection: Selection, shown: DisplayOptions) -> None:
    """Print groups of held-out answers of the evaluation `name`; raises UserError as show_steps."""
    directory = RunDirectory(run)
    config = read_config(directory)
    use_plugin_path(config.plugin_path)
    chosen = select(evaluation_groups(directory, name), selection)
    _print(chosen, f"evaluation {name}", config, shown)


def _print(chosen: list[SelectedGroup], where: str, config: RunConfig, shown: DisplayOptions) -> None:
    if not chosen:
        raise UserError(f"No trace of {where} meets the conditions; leave out --problem, --sample or --abstained.")
    first = chosen[: shown.limit]
    if shown.tokens and not any(each.inspected.gap(place) is not None for each in first for place in each.places):
        raise UserError(
            f"The trainer's log-probs of {where} are not on disk; leave out --tokens, or set journal.trainer_log_probs "
            "to true for the steps that follow."
        )
    if shown.as_json:
        print(
            json.dumps(
                {"groups": [group_to_dict(each, shown.tokens) for each in first], "found": len(chosen)}, indent=2
            )
        )
        return
    console = Console(highlight=False)
    tokenizer = PolicyTokenizer(config.policy.model)
    for each in first:
        console.print(group_table(each))
        if shown.text:
            _print_texts(console, each, tokenizer.boundaries)
        if shown.tokens:
            for place in each.places:
                console.print(token_gap_table(each.inspected, place, tokenizer.tokenizer))
    if len(chosen) > len(first):
        console.print(f"{len(first)} of {len(chosen)} groups; --limit shows more.")


def _print_texts(console: Console, selected: SelectedGroup, boundaries: Boundaries) -> None:
    advantages = selected.inspected.advantages
    for place in selected.places:
        own = None if advantages is None else advantages[place]
        sample = selected.inspected.group.samples[place]
        console.print(trace_panels(sample, advantages is not None, own, boundaries))
