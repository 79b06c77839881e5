"""The updates of a run that are left out, because their gradient was not finite when the run first came to them.

Without this record a resumed run would learn from the same journal, meet the same gradient and stop again, for ever.
"""

import json
from pathlib import Path

from exprl_megatron.errors import GradientNotFinite, RunStopped, UserError
from exprl_megatron.utils.files import write_atomically


class SkippedUpdates:
    """Kept in a JSON file, as lists of [stage, step, update of that step]; steps and updates count from 1."""

    def __init__(self, path: Path):
        self._path = path

    def add(self, stage: str, step: int, update: int) -> bool:
        """Whether the update was known; it is from now on, also after a crash."""
        known, entry = self._read(), [stage, step, update]
        if entry in known:
            return True
        write_atomically(self._path, json.dumps([*known, entry]).encode())
        return False

    def _read(self) -> list:
        try:
            known = json.loads(self._path.read_bytes())
        except FileNotFoundError:
            return []
        except ValueError as error:
            raise UserError(f"{self._path} is damaged ({error}); delete it.") from error
        return known


def not_learned(error: GradientNotFinite, stage: str, step: int, journal: Path | None) -> RunStopped:
    """What the user reads; `journal` holds the step's traces, None in SFT."""
    where = "the step's examples" if journal is None else f"the traces, log-probs and scores in {journal}"
    again = "" if journal is None else "; to sample the step again instead, delete that file first"
    return RunStopped(
        f"{error} in step {step} of {stage}; the weights are as they were. Look at {where}, the learning rate and "
        f"the losses before it. --resume continues without this update{again}."
    )
