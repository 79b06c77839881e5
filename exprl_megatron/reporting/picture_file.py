"""Files that pictures are written to."""

from pathlib import Path
from typing import TYPE_CHECKING

from exprl_megatron.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")


def check_picture(path: Path | None) -> None:
    """Check the suffix of `path` before the work that the picture shows; None: no picture.

    Raises:
        UserError: the suffix is none of SUFFIXES.
    """
    if path is not None and path.suffix.lower() not in SUFFIXES:
        raise UserError(f"The picture {path} has no known format; let its name end in {', '.join(SUFFIXES)}.")


def save_picture(figure: "Figure", path: Path) -> None:
    """Write `figure` to `path` in the format of its suffix; missing directories are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
