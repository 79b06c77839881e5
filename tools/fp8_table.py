"""Which published model can be trained in which FP8 kind at which tensor parallelism, as docs/precision.md has it.

Written from the code that refuses a run (exprl_megatron/models/precision_matrix.py): `python tools/fp8_table.py` writes
the table into the page, and tests/tools/test_fp8_table.py fails where the page has another one.
"""

import argparse
import re
from pathlib import Path
from typing import get_args

from exprl_megatron.config.policy import Layout, PolicyConfig
from exprl_megatron.config.precision import PrecisionConfig
from exprl_megatron.models.architecture import Architecture, layout_violations, read_architecture
from exprl_megatron.models.precision_matrix import BLACKWELL, HOPPER, Setting, precision_violations

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "precision.md"
PUBLISHED = ROOT / "exprl_megatron" / "planning" / "architectures"
BEGIN, END = "<!-- tools/fp8_table.py writes what follows -->\n", "<!-- until here -->\n"
KINDS = tuple(kind for kind in get_args(PrecisionConfig.model_fields["kind"].annotation) if "fp8" in kind)
SIZES = (1, 2, 4, 8)
_SHARE = re.compile(r"leaves a rank (\d+) of the model's (\d+) ([^;]+);")


def sentences(architecture: Architecture, kind: str, tp: int, **precision: bool) -> list[str]:
    """Return what refuses the kind at that `tp`, on the first GPUs that have it."""
    layout = Layout(tp=tp, sequence_parallel=tp > 1)
    policy = PolicyConfig(model="m", layout=layout, precision={"kind": kind} | precision, packing=not precision)
    capability = BLACKWELL if kind == "mxfp8" else HOPPER
    return precision_violations(Setting(policy, capability, architecture=architecture))


def cell(architecture: Architecture, kind: str, sizes: list[int]) -> str:
    """Return the sizes that are accepted, and why the others are refused."""
    accepted: list[str] = []
    reasons: dict[str, list[str]] = {}
    for tp in sizes:
        found = sentences(architecture, kind, tp)
        if not found:
            accepted.append(str(tp))
            continue
        share = _SHARE.search(found[0])
        why = f"{int(share[1]):,} of {int(share[2]):,} {share[3]} a rank" if share else found[0].rpartition("; ")[0]
        reasons.setdefault(why, []).append(str(tp))
    if not accepted and len(reasons) == 1:
        return "no"
    return "; ".join(
        [", ".join(accepted) or "none", *(f"not {', '.join(refused)}: {why}" for why, refused in reasons.items())]
    )


def table() -> str:
    """Return the Markdown table, with a column for all kinds that are alike, and a line for each model that is refused
    one.
    """
    models = {directory.name: read_architecture(directory) for directory in sorted(PUBLISHED.iterdir())}
    columns: dict[tuple[str, ...], list[str]] = {}
    for kind in KINDS:
        columns.setdefault(tuple(cell(each, kind, _sizes(each)) for each in models.values()), []).append(kind)
    names = (", ".join(f"`{kind}`" for kind in kinds) for kinds in columns.values())
    attention = {name: sentences(each, "fp8-delayed", 1, fp8_attention=True) for name, each in models.items()}
    heads = ["model (family)", *(f"{name}: tp" for name in names), "`fp8_attention`"]
    rows, notes = [heads, ["---"] * len(heads)], []
    for number, (name, architecture) in enumerate(models.items()):
        cells = [column[number] for column in columns]
        rows.append([f"{name} ({architecture.family})", *cells, "no" if attention[name] else "yes"])
        if refused := sentences(architecture, KINDS[0], 1) or attention[name]:
            notes.append(f"* {name}: {refused[0]}")
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", *notes, ""])


def _sizes(architecture: Architecture) -> list[int]:
    return [tp for tp in SIZES if not layout_violations(architecture, Layout(tp=tp, sequence_parallel=tp > 1))]


def page(text: str) -> str:
    """`text` of the page with today's table."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
