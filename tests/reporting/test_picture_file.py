"""Formats of pictures, which are checked before the work that they show."""

from pathlib import Path

import pytest

from exprl_megatron.errors import UserError
from exprl_megatron.reporting.picture_file import check_picture


@pytest.mark.parametrize("path", [None, Path("steps.svg"), Path("STEPS.PNG"), Path("a/b.Pdf")])
def test_a_known_suffix_is_accepted_in_any_case(path):
    check_picture(path)


@pytest.mark.parametrize("path", [Path("steps.gif"), Path("steps"), Path("svg")])
def test_any_other_is_refused_with_the_known_ones(path):
    with pytest.raises(
        UserError, match=f"The picture {path} has no known format; let its name end in .png, .svg, .pdf."
    ):
        check_picture(path)
