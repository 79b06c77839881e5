"""Every recipe in every precision on Transformer Engine's layers, with no GPU: shapes, names, recipes, checkpoints."""

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from helpers.recipe_layouts import BF16_ALONE, ON_TE

# The first test of a precision waits until all its models are built.
pytestmark = pytest.mark.timeout(3600)
HERE = Path(__file__).parent
PRECISIONS = {
    "bf16": (None, None, None),
    "fp8-delayed": ("TEDelayedScaling", "delayed", "HYBRID"),
    "fp8-tensorwise": ("Float8CurrentScaling", "float8_current_scaling", "HYBRID"),
    "fp8-blockwise": ("Float8BlockScaling", "float8_block_scaling", "E4M3"),
    "mxfp8": ("MXFP8BlockScaling", "mxfp8", "E4M3"),
}
EVERY = [
    (precision, model) for precision in PRECISIONS for model in ON_TE if precision == "bf16" or model not in BF16_ALONE
]


def built(precision: str) -> dict:
    """What build_recipes.py found."""
    return started()[precision].result()


@cache
def started() -> dict[str, Future]:
    """Two precisions at a time are built, whatever is asked for first."""
    pool = ThreadPoolExecutor(2)
    return {precision: pool.submit(build, precision) for precision in PRECISIONS}


def build(precision: str) -> dict:
    """In a process of its own, as pretending a GPU changes torch for good."""
    with TemporaryDirectory() as directory:
        file = Path(directory) / "found.json"
        models = [model for kind, model in EVERY if kind == precision]
        command = [sys.executable, "-W", "ignore", HERE / "build_recipes.py", precision, file, *models]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("precision", "model"), EVERY)
def test_every_rank_of_a_recipe_holds_what_the_table_of_names_says(precision, model):
    found = built(precision)[model]
    assert found["wrong"] == []
    layout = ON_TE[model]
    data_parallel = layout.dp if layout.ep > 1 else 1
    assert found["built"] == layout.tp * layout.pp * data_parallel


@pytest.mark.parametrize(("precision", "model"), EVERY)
def test_the_recipe_in_force_is_the_one_that_was_asked_for(precision, model):
    contexts = built(precision)[model]["contexts"]
    name, kind, number_format = PRECISIONS[precision]
    if name is None:
        assert contexts == {"recipe": None, "in_force": {}}
        return
    assert (contexts["recipe"], contexts["is"], contexts["format"]) == (name, [kind], number_format)
    assert contexts["fields"]["fp8_dpa"] == contexts["fields"]["fp8_mha"] == "False"
    first, middle, last = contexts["in_force"].values()
    assert middle is True
    assert first is last is (precision == "fp8-delayed")


def test_delayed_scaling_remembers_one_amax_as_megatron_does_by_default():
    fields = built("fp8-delayed")["llama-3.3-70b"]["contexts"]["fields"]
    assert (fields["amax_history_len"], fields["amax_compute_algo"], fields["margin"]) == ("1", "most_recent", "0")
