"""Where a run keeps what it writes, and the rule that no run overwrites another."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from exprl_megatron.config.load import check_config
from exprl_megatron.config.problems import ProblemsConfig
from exprl_megatron.config.renamed import with_new_names
from exprl_megatron.config.resuming import refused_changes
from exprl_megatron.config.run import RunConfig
from exprl_megatron.errors import UserError
from exprl_megatron.judging.prompt import is_shipped_hash
from exprl_megatron.models.routing import with_router_replay
from exprl_megatron.utils.files import Claim, keep_private, write_atomically

PLUGINS = "plugins."
"""Begins the keys of inputs.json that have hashes of the user's own code."""


class RunDirectory:
    """The paths of one run, and the claim on its directory."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.config = self.root / "config.yaml"
        self.record = self.root / "run.json"
        self.inputs = self.root / "inputs.json"
        self.skipped_updates = self.root / "skipped_updates.json"
        self.logs = self.root / "logs"
        self.run_log = self.logs / "run.log"
        self.journal = self.root / "journal"
        self.trainer_log_probs = self.root / "trainer_log_probs"
        self.checkpoints = self.root / "checkpoints"
        self.models = self.root / "models"
        self.evaluations = self.root / "evaluations"
        self.tensorboard = self.root / "tensorboard"
        self.metrics = self.root / "metrics.jsonl"
        self.timeline = self.root / "timeline.jsonl"
        self.sync = self.root / "sync"
        self.judgements = self.root / "judgements.sqlite"
        self.kept_problems = self.root / "kept_problems"
        self.registry = self.root / "servers"
        self.resolved = self.root / "resolved.yaml"
        self.stop_request = self.root / "stop"

    def claim(self, config: RunConfig, resume: bool, contents: Mapping[str, str] | None = None) -> "Claim":
        """Claim the directory for this process and write the resolved config into it; later code reads that file.

        `contents` is what `hash_inputs` returns of the config. A run that ended before it had anything to keep does not
        count.

        Raises:
            UserError: the directory holds another run, where `resume` finds none, or one that learns something else
                (see config/resuming.py) or from other contents, or where a live process has it.
        """
        known, has_started = self.config.is_file(), self._holds_work()
        if has_started and not resume:
            raise UserError(
                f"The directory {self.root} already holds a run; "
                "continue with it by --resume, or choose another directory."
            )
        # Servers that `exprl serve` keeps may be there before the run, and the config that a recipe gave it.
        before = (self.registry, self.resolved)
        if not known and self.root.is_dir() and any(path not in before for path in self.root.iterdir()):
            raise UserError(f"The directory {self.root} holds other files; choose a new or empty directory.")
        if not known and resume:
            raise UserError(f"There is no run in {self.root} to resume; start it without --resume.")
        config = self._resolved(config, has_started)
        if config.permissions == "private":
            keep_private(self.root)
        self.root.mkdir(parents=True, exist_ok=True)
        claim = Claim(self.root)
        try:
            if has_started:
                self._refuse_changes(config, contents)
            elif known:
                shutil.rmtree(self.logs, ignore_errors=True)
            for path in (self.logs, self.journal, self.checkpoints, self.models, self.evaluations):
                path.mkdir(exist_ok=True)
            self.stop_request.unlink(missing_ok=True)
            write_atomically(self.config, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())
            if contents is not None:
                write_atomically(self.inputs, json.dumps(contents, indent=2).encode())
        except BaseException:
            claim.release()
            raise
        return claim

    def changed_plugins(self, contents: Mapping[str, str]) -> list[str]:
        """Return a sentence for each plugin whose source is not that of the run that is here."""
        recorded = self._recorded_inputs() or {}
        return [
            f"The source of {key.removeprefix(PLUGINS)} has changed since the run in {self.root} last started "
            f"(SHA-256 {recorded[key][:12]}, now {contents[key][:12]}); the steps that follow use the new one."
            for key in sorted(recorded.keys() & contents.keys())
            if key.startswith(PLUGINS) and recorded[key] != contents[key]
        ]

    def _resolved(self, config: RunConfig, has_started: bool) -> RunConfig:
        """Return `config` with all that is decided where a run starts; one that is resumed continues as it was."""
        if has_started and config.policy.router_replay is None:
            config = _with_replay(config, self._started_config().policy.router_replay)
        return with_router_replay(config.with_precision())

    def _started_config(self) -> RunConfig:
        """Return the config that the run was started with. One of a version without router replay continues
        without it.
        """
        config = read_config(self)
        return _with_replay(config, config.policy.router_replay or False)

    def _refuse_changes(self, config: RunConfig, contents: Mapping[str, str] | None) -> None:
        """Raise UserError where the run in this directory would continue differently."""
        recorded = self._recorded_inputs() if contents is not None else None
        if recorded is not None and contents is not None and (others := _different(recorded, contents)):
            raise UserError(
                f"The contents of {', '.join(others)} are others than when the run in {self.root} was started; "
                f"{_earlier_prompts(others, recorded)}put them back, or start a new run in another directory."
            )
        if changed := refused_changes(self._started_config(), config, same_contents=recorded is not None):
            raise UserError(
                f"The run in {self.root} was started with other values of {', '.join(changed)}; "
                "resume it with its own config, or start a new run in another directory. docs/resume.md lists what may "
                "change."
            )

    def recorded_problems(self, config: RunConfig) -> dict[ProblemsConfig, str]:
        """Return the hash of each set of problems of `config`, the run's own, when the run last started.

        Raises:
            UserError: the record is damaged.
        """
        recorded = self._recorded_inputs() or {}
        sets = {f"stages.{number}.problems": stage.problems for number, stage in enumerate(config.stages)}
        if config.evaluation is not None:
            sets["evaluation.problems"] = config.evaluation.problems
        return {problems: recorded[key] for key, problems in sets.items() if problems is not None and key in recorded}

    def _recorded_inputs(self) -> dict[str, str] | None:
        """Return the inputs that the run was started with; None where they were not recorded."""
        try:
            return json.loads(self.inputs.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UserError(
                f"{self.inputs} is damaged ({error}); delete it to resume without comparing the inputs."
            ) from error

    def _holds_work(self) -> bool:
        """Return whether a run has left anything here that was sampled, learned or measured."""
        kept = (self.journal, self.checkpoints, self.models, self.evaluations, self.metrics)
        return self.config.is_file() and any(
            file.stat().st_size for path in kept for file in (path, *path.rglob("*")) if file.is_file()
        )


def _with_replay(config: RunConfig, replay: bool | None) -> RunConfig:
    return config.model_copy(update={"policy": config.policy.model_copy(update={"router_replay": replay})})


def _different(recorded: Mapping[str, str], contents: Mapping[str, str]) -> list[str]:
    """Return the keys whose values are not the same in both, or that one of them lacks; sources of plugins may
    change.
    """
    keys = {key for key in recorded.keys() | contents.keys() if not key.startswith(PLUGINS)}
    return sorted(key for key in keys if recorded.get(key) != contents.get(key))


def _earlier_prompts(keys: Sequence[str], recorded: Mapping[str, str]) -> str:
    """Return how to continue with the shipped prompts that a run was started with, where they are what differs."""
    named = [f"{key}={recorded[key]}" for key in keys if is_shipped_hash(recorded.get(key, ""))]
    return f"resume it with {' '.join(named)} (the prompts that it was started with), " if named else ""


def require_run(root: Path) -> None:
    """Check that there is a run in the directory `root`.

    Raises:
        UserError: there is none.
    """
    if not RunDirectory(root).config.is_file():
        raise UserError(f"There is no run in {root}; give the directory of one.")


def read_config(directory: RunDirectory) -> RunConfig:
    """Return the resolved config that the run's directory holds, which an earlier version may have written.

    Raises UserError where there is none.
    """
    require_run(directory.root)
    tree = with_new_names(yaml.safe_load(directory.config.read_text()))
    return check_config(tree, str(directory.config))
