"""What NeMo-Run's command line refuses, as one sentence: with the names that there are, without the whole config."""

import dataclasses
import difflib
import functools
import logging
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import nemo_run as run
from nemo_run.cli import cli_parser

from exprl_megatron.config.load import known_keys
from exprl_megatron.errors import RunStopped, UserError
from recipes import places

_UNKNOWN = re.compile(r"No parameter named '(?P<name>\w+)' exists for <\w+\[(?P<owner>\w+)\((?P<body>.*)", re.DOTALL)
_INVALID = re.compile(r"Invalid attribute '(?P<name>[^']+)' for ")
_CONFIGS = ("config", "prime", "sparse")
"""Arguments of the experiments that are configs of runs."""
_ATTRIBUTE = re.compile(r"^  (\w+)=", re.MULTILINE)
_EXECUTOR = re.compile(r"Executor (\S+) not found")
EXECUTORS = ("local", "slurm", "slurm_over_ssh")
_LONGEST = 300


def check_factory(factory: str | None, names: Sequence[str]) -> None:
    """Raise UserError where `factory`, as `NAME` or `NAME(arguments)`, names none of `names`, which are the models."""
    name = (factory or names[0]).partition("(")[0].strip()
    if name not in names:
        raise UserError(f"There is no model {name}; {_suggestion(name, names)}")


def shorten(models: Sequence[str]) -> None:
    """Let NeMo-Run's commands end in one sentence and status 2 (1 where a job failed), and print no whole config.

    `models` are the recipes' names. NeMo-Run prints every argument before it has checked any; `python -m recipes
    resolve` prints a config where it is wanted.
    """
    cli_parser.logger.disabled = True
    logging.getLogger(cli_parser.__name__).disabled = True
    run.dryrun_fn = _named
    run.cli.RunContext.cli_execute = _in_a_sentence(run.cli.RunContext.cli_execute, models)


def _named(configured: run.Partial, executor: run.Executor | None = None, build: bool = False) -> None:
    where = "this machine" if executor is None else type(executor).__name__
    print(f"{configured.__fn_or_cls__.__name__} on {where}")


def _in_a_sentence(execute: Callable[..., None], models: Sequence[str]) -> Callable[..., None]:
    @functools.wraps(execute)
    def executed(context: run.cli.RunContext, *arguments: Any) -> None:
        try:
            check_factory(context.factory, models)
            execute(context, *arguments)
        except RunStopped as error:
            _end(str(error), 1)
        except (UserError, ValueError, cli_parser.CLIException) as error:
            _end(sentence(error, sys.argv[1:]), 2)

    return executed


def _end(text: str, status: int) -> None:
    print(f"recipes: {text}", file=sys.stderr)
    raise SystemExit(status)


def sentence(error: Exception, arguments: Sequence[str] = ()) -> str:
    """Return what was wrong with the command's `arguments`, in one sentence; a UserError's own words as they are."""
    if isinstance(error, UserError):
        return str(error)
    text = str(error)
    argument = getattr(error, "arg", "")
    if (executor := _EXECUTOR.fullmatch(text)) is not None:
        return f"There is no executor {executor[1]}; {_suggestion(executor[1], EXECUTORS)}"
    if found := _UNKNOWN.search(text):
        known = _attributes(argument.partition("=")[0], found["owner"], found["body"])
        return f"{argument} sets {found['name']}, which there is not; {_suggestion(found['name'], known)}"
    if (invalid := _INVALID.search(text)) and (found_key := _invalid_key(invalid["name"], arguments)):
        return found_key
    words = text.partition(" (Argument:")[0].strip()
    first = words.splitlines()[0] if words else type(error).__name__
    return f"{argument + ': ' if argument else ''}{first[:_LONGEST].rstrip('.')}; correct it."


def _invalid_key(name: str, arguments: Sequence[str]) -> str | None:
    """Return what is wrong with the argument that has `name` in its key; None where there is no such argument."""
    for argument in arguments:
        parts = [part for part in re.split(r"[.\[\]]", argument.partition("=")[0]) if part]
        if "=" not in argument or name not in parts:
            continue
        above = parts[: parts.index(name)]
        known: Sequence[str] = (*_CONFIGS, "nodes", "site", "run", "resume")
        if above and above[0] in _CONFIGS:
            known = known_keys(tuple(int(part) if part.isdigit() else part for part in above[1:]))
        elif above:
            known = [field.name for field in dataclasses.fields(places.Nodes if "nodes" in above[0] else places.Site)]
        return f"{argument} sets {name}, which there is not; {_suggestion(name, known)}"
    return None


def _attributes(key: str, owner: str, body: str) -> list[str]:
    """Return names that may be set: all fields of an executor, of `nodes` and of `site`; else those that the text
    shows.
    """
    parent = key.split(".")[-2] if "." in key else None
    if parent and (inner := re.search(rf"\b{re.escape(parent)}=<\w+\[(\w+)\(", body)):
        owner = inner[1]
    made = getattr(places, owner, None) or getattr(run, owner, None)
    if dataclasses.is_dataclass(made):
        return [field.name for field in dataclasses.fields(made)]
    return _ATTRIBUTE.findall(body)


def _suggestion(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
