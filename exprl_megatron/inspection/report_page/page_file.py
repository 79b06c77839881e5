"""The page as one HTML file with data, script and plotting library, and a content policy that forbids all else."""

import base64
import hashlib
import os
from functools import cache
from pathlib import Path

import jinja2
from plotly.offline import get_plotlyjs

from exprl_megatron.errors import UserError
from exprl_megatron.inspection.report_page.page_blocks import PageBlock
from exprl_megatron.inspection.report_page.page_json import embedded
from exprl_megatron.inspection.report_page.page_model import PageModel, PageReader
from exprl_megatron.utils.files import open_atomically

MOST_BYTES = 20_000_000
ASSETS = Path(__file__).parent / "assets"
_PROGRAM = ("page_parts.js", "curve_charts.js", "trace_browser.js", "judge_charts.js", "time_charts.js", "page_main.js")
_RESERVE = 200_000
"""Bytes kept back for the page's own program and style."""


def write_page(path: Path, reader: PageReader, most_bytes: int = MOST_BYTES) -> PageModel:
    """Write the page, for its owner alone where it shows references; complete on disk when this returns.

    Raises:
        UserError: it does not fit into `most_bytes`.
    """
    model = reader.model(page_bytes=most_bytes - len(get_plotlyjs()) - _RESERVE)
    page = render(model)
    if len(page) > most_bytes:
        raise UserError(
            f"The page takes {len(page) / 1e6:.1f} MB with few traces, more than --max-mb allows; name fewer runs, or "
            "raise it."
        )
    with open_atomically(path) as file:
        if model.tree["references"]:
            os.fchmod(file.fileno(), 0o600)
        file.write(page)
    return model


def render(model: PageModel, live: bool = False) -> bytes:
    """Return the page; a `live` one asks its server for blocks and for what is new."""
    scripts = [get_plotlyjs(), _program()]
    template = _environment().get_template("page.html.j2")
    page = template.render(
        policy=content_policy(scripts, live),
        style=(ASSETS / "page.css").read_text(),
        scripts=scripts,
        model=embedded(model.tree),
        blocks={} if live else model.blocks,
        live=live,
        title=", ".join(run["name"] for run in model.tree["runs"]),
    )
    return page.encode()


def content_policy(scripts: list[str], live: bool) -> str:
    """Return a policy by which only these scripts run, and a live page fetches from its own server alone."""
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    rules = {
        "default-src": "'none'",
        "script-src": hashes,
        # The plotting library makes style elements.
        "style-src": "'unsafe-inline'",
        # A chart is saved as a picture.
        "img-src": "data: blob:",
        "connect-src": "'self'" if live else "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def block_bytes(block: PageBlock) -> bytes:
    """Return a block as a live page fetches it: JSON, deflated by gzip."""
    return base64.b64decode(block.packed)


@cache
def _program() -> str:
    return "\n".join(['"use strict";', *((ASSETS / name).read_text() for name in _PROGRAM)])


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
