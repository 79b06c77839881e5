"""The updates of a run that are skipped, since their gradient was not finite in an earlier attempt.

Without this record a resumed run would learn from the same rollout log, get the same gradient, and stop every time.
"""

import json
from pathlib import Path

from exprl_megatron.errors import GradientNotFinite, RunStopped, UserError
from exprl_megatron.utils.files import write_atomically


class SkippedUpdates:
    """A JSON file of lists of [stage, step, update of that step]; steps and updates count from 1."""

    def __init__(self, path: Path):
        self._path = path

    def add(self, stage: str, step: int, update: int) -> bool:
        """Add an update, also for later attempts of the run; returns whether the file had it already.

        Raises:
            UserError: the file is damaged.
        """
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


def nonfinite_gradient_error(error: GradientNotFinite, stage: str, step: int, journal: Path | None) -> RunStopped:
    """Build the error for a gradient that is not finite; `journal` has the step's traces, None in SFT."""
    where = "the step's examples" if journal is None else f"the traces, log-probs and scores in {journal}"
    again = "" if journal is None else "; to sample the step again instead, delete that file first"
    return RunStopped(
        f"{error} in step {step} of {stage}; the weights are unchanged. Check {where}, the learning rate and the "
        f"losses before it. --resume continues without this update{again}."
    )
