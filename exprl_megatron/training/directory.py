"""Where a run keeps what it writes, and the rule that no run overwrites another."""

import shutil
from pathlib import Path

import yaml

from exprl_megatron.config.load import check_config
from exprl_megatron.config.run import RunConfig
from exprl_megatron.errors import UserError
from exprl_megatron.files import Claim, write_atomically


class RunDirectory:
    """The paths of one run, and the claim on its directory."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.config = self.root / "config.yaml"
        self.logs = self.root / "logs"
        self.journal = self.root / "journal"
        self.checkpoints = self.root / "checkpoints"
        self.models = self.root / "models"
        self.evaluations = self.root / "evaluations"
        self.tensorboard = self.root / "tensorboard"
        self.metrics = self.root / "metrics.jsonl"
        self.timeline = self.root / "timeline.jsonl"
        self.sync = self.root / "sync"
        self.judgements = self.root / "judgements.sqlite"
        self.registry = self.root / "servers"
        self.resolved = self.root / "resolved.yaml"
        self.stop_request = self.root / "stop"

    def claim(self, config: RunConfig, resume: bool) -> "Claim":
        """Take the directory for this process and write the resolved config into it.

        Raises UserError where it holds another run, where `resume` finds none or one of another
        config (the layout and the servers may differ), or where a live process has it. A run that
        ended before it had anything to keep does not count.
        """
        known, begun = self.config.is_file(), self._holds_work()
        if begun and not resume:
            raise UserError(
                f"The directory {self.root} already holds a run; "
                "go on with it by --resume, or choose another directory."
            )
        # Servers that `exprl serve` keeps may be there before the run, and the config that a recipe gave it.
        before = (self.registry, self.resolved)
        if not known and self.root.is_dir() and any(path not in before for path in self.root.iterdir()):
            raise UserError(f"The directory {self.root} holds other files; choose a new or empty directory.")
        if not known and resume:
            raise UserError(f"There is no run in {self.root} to resume; start it without --resume.")
        self.root.mkdir(parents=True, exist_ok=True)
        claim = Claim(self.root)
        try:
            if begun:
                _refuse_changes(yaml.safe_load(self.config.read_text()), config.model_dump(mode="json"), self.root)
            elif known:
                shutil.rmtree(self.logs, ignore_errors=True)
            for path in (self.logs, self.journal, self.checkpoints, self.models, self.evaluations):
                path.mkdir(exist_ok=True)
            self.stop_request.unlink(missing_ok=True)
            write_atomically(self.config, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())
        except BaseException:
            claim.release()
            raise
        return claim

    def _holds_work(self) -> bool:
        """Whether a run has left anything here that was sampled, learned or measured."""
        kept = (self.journal, self.checkpoints, self.models, self.evaluations, self.metrics)
        return self.config.is_file() and any(
            file.stat().st_size for path in kept for file in (path, *path.rglob("*")) if file.is_file()
        )


def read_config(directory: RunDirectory) -> RunConfig:
    """The resolved config that the run's directory holds; UserError where there is none."""
    if not directory.config.is_file():
        raise UserError(f"There is no run in {directory.root}; give the directory of one.")
    return check_config(yaml.safe_load(directory.config.read_text()), str(directory.config))


# What a resumed run may do differently: none of it changes what is learned from what.
_FREE = ("directory", "server", "sync", "checkpoint", "policy.layout", "placement", "judge.server", "debug.assertions")


def _refuse_changes(old: dict, new: dict, root: Path) -> None:
    changed = sorted(
        key
        for key in _leaves(old).keys() | _leaves(new).keys()
        if _leaves(old).get(key) != _leaves(new).get(key)
        and not any(key == free or key.startswith(free + ".") for free in _FREE)
    )
    if changed:
        raise UserError(
            f"The run in {root} was started with other values of {', '.join(changed)}; "
            "resume it with its own config, or start a new run in another directory."
        )


def _leaves(tree, prefix: str = "") -> dict:
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    else:
        return {prefix: tree}
    return {k: v for key, value in items for k, v in _leaves(value, f"{prefix}.{key}" if prefix else str(key)).items()}
