"""Sphinx settings of the documentation; `make docs` builds it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from exprl_megatron import __version__

project = "exprl_megatron"
author = "the exprl_megatron authors"
version = release = __version__
extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
html_theme = "furo"
html_title = f"exprl_megatron {__version__}"
nitpicky = True
