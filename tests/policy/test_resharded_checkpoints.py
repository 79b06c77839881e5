"""A stage cut short in one layout continues in any other; in the same layout bit for bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.ranks import run_ranks
from helpers.witness import largest_difference
from resharding_worker import EXTRA, KINDS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict:
    models = {
        family: tiny_model(family, tied=family != "qwen3-moe", vocab_size=107, layers=4)
        for family in ("qwen3", "qwen3-moe", "qwen3.5")
    }
    out = tmp_path_factory.mktemp("resharded")
    return run_ranks(Path(__file__).with_name("resharding_worker.py"), 4, out, timeout_s=900, models=models)


@pytest.mark.parametrize("kind", KINDS)
def test_in_the_same_layout_the_resumed_stage_is_the_uninterrupted_one_bit_for_bit(results, kind):
    resumed = dict(results[f"{kind} resumed"])
    assert resumed.pop("extra") == EXTRA
    assert resumed == results[f"{kind} uninterrupted"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind, case in KINDS.items() if case[3] for name in (*case[3], "one rank and back")],
)
def test_in_any_other_layout_it_continues_with_the_same_steps(results, kind, name):
    expected, resumed = results[f"{kind} uninterrupted"], results[f"{kind} {name}"]
    assert resumed["extra"] == EXTRA
    for ours, theirs in zip(resumed["updates"], expected["updates"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert largest_difference(resumed["log_probs"], expected["log_probs"]) <= 1e-4
    assert largest_difference(resumed["start"], expected["start"]) <= 1e-5
