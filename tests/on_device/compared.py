"""What a test on any device has to show: figures beside what they must be."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Compared:
    """One figure beside what it must be."""

    what: str
    measured: str
    wanted: str
    good: bool


def failed(compared: Iterable[Compared]) -> list[Compared]:
    """Those that are not as they must be."""
    return [one for one in compared if not one.good]


def equal(what: str, found: object, wanted: object) -> Compared:
    """`found` must be `wanted`."""
    return Compared(what, str(found), str(wanted), found == wanted)


def at_least(what: str, found: float, least: float) -> Compared:
    """`found` must be `least` or more."""
    return Compared(what, f"{found:.4g}", f"at least {least:g}", found >= least)


def at_most(what: str, found: float, most: float) -> Compared:
    """`found` must be `most` or less."""
    return Compared(what, f"{found:.4g}", f"at most {most:g}", found <= most)


def near(what: str, found: float, wanted: float, relative: float) -> Compared:
    """`found` must differ from `wanted` by a share of at most `relative`."""
    good = abs(found - wanted) <= relative * abs(wanted)
    return Compared(what, f"{found:.4f}", f"{wanted:.4f} within {relative:.3%}", good)
