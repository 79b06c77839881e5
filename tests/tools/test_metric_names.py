"""docs/metrics.md: every name that the code gives to a metric is there, and nothing else is."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest
from metric_names import SECTIONS, page, undocumented

from exprl_megatron.reporting.timeline import ROLLOUTS, STEP
from exprl_megatron.weight_sync.timing import SyncTimes

ROOT = Path(__file__).parents[2]
PACKAGES = ("training", "algorithms", "serving", "weight_sync", "evaluation", "policy", "judging")
_NAME = re.compile(r"[a-z_]+(/[a-z0-9_@\-*]+)+")
NOT_METRICS = {"common_state/shard_0_1", "needs/*", "transfers/*", "*/*", "correction/squared", "application/json"}
"""Keys of a store, a file, a media type, and a sum from which a metric is made."""


def _texts(package):
    """Strings of a package's code, `*` in place of what is put into them."""
    for path in sorted((ROOT / "exprl_megatron" / package).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(p.value) if isinstance(p, ast.Constant) else "*" for p in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
                yield node.value


@pytest.fixture(scope="module")
def names():
    """What the code calls metrics: texts of the form GROUP/NAME."""
    texts = {text for package in PACKAGES for text in _texts(package)}
    return {text for text in texts if _NAME.fullmatch(text)} - NOT_METRICS


def _found(package, pattern):
    sources = (ROOT / "exprl_megatron" / package).glob("*.py")
    return {part for path in sources for part in re.findall(pattern, path.read_text(encoding="utf-8"))}


def test_every_name_in_the_code_is_on_the_page(names):
    assert {"reward/mean", "sampler_gap/max", "judge/*", "segments/count_*", "kl/teacher"} <= names
    put_in = {
        "sync/*": {name.partition("/")[2] for name in SyncTimes().metrics()},
        "judge/*": _found("judging", r'counts\["([\w-]+)"\]') | {"rubric_fallbacks"},
        # A checkpoint is written after the step's metrics.
        "seconds/*": _found("training", r'clock\("(\w+)"\)') - {"save"} | {ROLLOUTS, STEP},
        "padding/*": {"padded", "packed"},
        "gate/*": {"misplacement_right", "separation", "auroc", "abstained"},
    }
    assert {"asked", "hedge-won"} <= put_in["judge/*"] and {"train", "sync"} <= put_in["seconds/*"]
    filled = {name.replace("*", part) for name in names for part in put_in.get(name, {"1"})}
    assert not undocumented(filled)


def test_names_that_were_never_written_are_not_known():
    assert undocumented(["reward/man", "reward", "losses", "score/1/2", "loss"]) == [
        "losses",
        "reward",
        "reward/man",
        "score/1/2",
    ]


def test_the_page_is_made_from_the_table_and_no_metric_is_there_twice():
    assert (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8") == page(), "run `make reference`"
    entries = Counter(metric.name for section in SECTIONS for metric in section.metrics)
    assert max(entries.values()) == 1
