"""`exprl judgement`: what a judge, or the builder of a rubric, was asked and what it answered."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from exprl_megatron.errors import UserError
from exprl_megatron.inspection.judgement_list import scored_by
from exprl_megatron.judging.judgement import Scored, judgement_to_dict
from exprl_megatron.judging.store import JudgementStore
from exprl_megatron.judging.store_rows import Entry
from exprl_megatron.reporting.plain_text import escaped_text
from exprl_megatron.runs.directory import RunDirectory, read_config


def show_judgement(prefix: str | None, run: Path | None, store: Path | None, as_json: bool, limit: int) -> None:
    """Print the entry whose hash begins with `prefix`, or a list of the `limit` latest without one.

    An entry of a run is shown with the traces that it scored, `limit` of them at most.
    Raises UserError where there is no such store, run or hash.
    """
    with JudgementStore(store_file(run, store), read_only=True) as kept:
        entries = kept.newest(limit) if prefix is None else [kept.entry(prefix)]
    places = [] if run is None or prefix is None else scored_by(run, entries[0].key, limit)
    if as_json:
        records = [entry_to_dict(entry) for entry in entries]
        if prefix is not None:
            records[0]["scored"] = places
        print(json.dumps({"entries": records} if prefix is None else records[0], indent=2))
        return
    Console().print(_listing(entries, limit) if prefix is None else _page(entries[0], places))


def store_file(run: Path | None, store: Path | None) -> Path:
    """Return the path of the judgement store: `store` itself, or that of the run in directory `run`.

    Raises:
        UserError: neither or both are given, or the file does not exist.
    """
    if run is not None and store is None:
        directory = RunDirectory(run)
        judge = read_config(directory).judge
        file = Path(judge.store) if judge is not None and judge.store is not None else directory.judgements
    elif store is not None and run is None:
        file = store
    else:
        raise UserError("Exactly one judgement store is shown; give either --run DIR or --store FILE.")
    if not file.is_file():
        raise UserError(f"There is no judgement store {file}; give --run DIR or --store FILE of a run that judged.")
    return file


def entry_to_dict(entry: Entry) -> dict:
    """Return {hash, kind, kept, asked, answer} and, by its kind, {judgement: {kind, ...}} or {rubric}."""
    record: dict[str, Any] = {"hash": entry.key, "kind": _kind(entry), "kept": _time(entry)}
    record |= {"asked": entry.question, "answer": entry.answer}
    if isinstance(entry.result, str):
        return record | {"rubric": json.loads(entry.result)}
    return record | {"judgement": judgement_to_dict(entry.result)}


def _page(entry: Entry, places: list[dict]) -> RenderableType:
    facts = Table.grid(padding=(0, 2))
    for name, value in (("hash", entry.key), ("kind", _kind(entry)), ("kept", _time(entry))):
        facts.add_row(name, value)
    for number, place in enumerate(places):
        facts.add_row("scored" if number == 0 else "", escaped_text(_place_text(place)))
    parts: list[RenderableType] = []
    for name, value in entry.question.items():
        if name == "messages":
            parts += [_panel(f"asked: {message['role']}", message["content"]) for message in value]
        elif isinstance(value, dict | list):
            parts.append(_panel(f"asked: {name}", json.dumps(value, indent=2, ensure_ascii=False)))
        elif value is not None:
            facts.add_row(escaped_text(name), escaped_text(str(value)))
    parts.append(_panel("answered", entry.answer))
    if isinstance(entry.result, str):
        parts.append(_panel("rubric", json.dumps(json.loads(entry.result), indent=2, ensure_ascii=False)))
    elif entry.result.evidence != entry.answer:
        parts.append(_panel("evidence", entry.result.evidence))
    return Group(facts, *parts, Text.assemble("verdict: ", (_verdict(entry), "bold")))


def _place_text(place: dict) -> str:
    sample = f"{place['sample']}" + ("" if place["segment"] is None else f".{place['segment']}")
    weights = ", ".join(dict.fromkeys(version for version, _, _ in place["weight_versions"]))
    return f"{place['stage']}, step {place['step']}: {place['problem_id']}, sample {sample}, weights {weights}"


def _listing(entries: list[Entry], limit: int) -> Table:
    table = Table("hash", "kind", "kept", "problem", "verdict", caption=f"the latest, at most {limit}")
    for entry in entries:
        problem = escaped_text(str(entry.question.get("problem", "")))
        table.add_row(entry.key[:12], _kind(entry), _time(entry)[:19], problem, _verdict(entry))
    return table


def _panel(title: str, text: str) -> Panel:
    return Panel(escaped_text(text), title=Text(title), title_align="left")


def _kind(entry: Entry) -> str:
    return "rubric" if isinstance(entry.result, str) else "judgement"


def _verdict(entry: Entry) -> str:
    if isinstance(entry.result, str):
        return "a rubric"
    if isinstance(entry.result, Scored):
        return f"scored {entry.result.value:g}"
    return f"abstained: {entry.result.reason}"


def _time(entry: Entry) -> str:
    return datetime.fromtimestamp(entry.created).astimezone().isoformat(sep=" ", timespec="seconds")
