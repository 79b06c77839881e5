"""Slurm's time limits, and the signal that Slurm sends ahead of them."""

import re

from exprl_megatron.errors import UserError

LEAD_S = 1200
"""Seconds from the signal to the time limit: more than a step and a checkpoint take (tests/recipes/test_scales.py)."""
SIGNAL = f"B:USR1@{LEAD_S}"
"""The signal goes to the batch script, which forwards it to the trainer."""

_LEAD_OF_SLURM_S = 60
_CLOCK = re.compile(r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})")


def check_time_limit(limit: str, signal: str | None) -> None:
    """Check that a job has time to work before Slurm asks it to stop.

    Args:
        limit: the job's `--time`; one that sets no limit, such as UNLIMITED, passes.
        signal: the job's `--signal`.

    Raises:
        UserError: the signal is sent when the job starts.
    """
    seconds = seconds_of(limit)
    if not signal or seconds is None:
        return
    lead = re.search(r"@(\d+)$", signal)
    lead_s = int(lead[1]) if lead else _LEAD_OF_SLURM_S
    if seconds <= lead_s:
        raise UserError(
            f"run.executor.time is {limit}, but run.executor.signal={signal} asks the run to stop {lead_s} s before "
            f"its time limit, which is when it starts; set a longer time, or run.executor.signal=B:USR1@SECONDS with "
            f"fewer seconds than {seconds}."
        )


def seconds_of(limit: str) -> int | None:
    """Return the seconds of a time in one of Slurm's forms (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S); None: not one."""
    found = _CLOCK.fullmatch(limit.strip())
    if found is None:
        return None
    parts = [int(part) for part in found["clock"].split(":")]
    if found["days"] is not None:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return int(found["days"]) * 86400 + hours * 3600 + minutes * 60 + seconds
    if len(parts) == 1:
        parts = [parts[0], 0]
    hours, minutes, seconds = [0, *parts][-3:]
    return hours * 3600 + minutes * 60 + seconds
