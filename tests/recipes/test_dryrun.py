"""What a dry run prints is what golden/ holds, to the letter: `python tests/recipes/test_dryrun.py` writes it again."""

import contextlib
import io
import os
import re
import sys
import tempfile
import textwrap
from pathlib import Path

import nemo_run as run
import pytest
from nemo_run.config import get_nemorun_home, set_nemorun_home

from recipes import executors, llama3p3_70b, miniature, qwen3_4b
from recipes.experiment import launch

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"


def local():
    recipe = miniature.exprl_then_sparse_rl()
    recipe.site.variables = {"GREETING": "two words, and a $sign"}
    return recipe, None


def cluster(**changes) -> run.Config:
    executor = executors.slurm()
    for name, value in ({"account": "research", "partition": "batch"} | changes).items():
        setattr(executor, name, value)
    return executor


def separate():
    """A heterogeneous job: the trainer on one node, both kinds of servers on another."""
    return miniature.exprl_then_sparse_rl(), cluster(exclusive=None, mem=None)


def container():
    """A heterogeneous job of three components in a container."""
    recipe = llama3p3_70b.exprl_then_sparse_rl(nodes=8)
    recipe.site.environment = ["HF_TOKEN"]
    image = "registry.example.com/exprl:latest"
    return recipe, cluster(partition="h100", container_image=image, container_mounts=["/models:/models:ro"])


def one_allocation():
    """All processes on one node, which they divide among them."""
    return qwen3_4b.exprl(nodes=1), cluster()


CASES = {"local": local, "separate": separate, "container": container, "one_allocation": one_allocation}


def printed(name: str, home: Path) -> str:
    """The dry run of a case, with names in place of what differs from run to run."""
    recipe, executor = CASES[name]()
    recipe.site.workdir = "/shared/exprl_megatron"
    before = get_nemorun_home()
    set_nemorun_home(str(home))
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            launch(recipe, executor, dryrun=True)
    finally:
        set_nemorun_home(before)
    assert not list(home.rglob("*.sh")), "a dry run leaves nothing behind"
    text = out.getvalue()
    text = text[text.index("# ====") :].replace(str(home), "/home/me/.nemo_run")
    return re.sub(r"_\d{15,}", "_ID", text)


@pytest.mark.parametrize("name", CASES)
def test_a_dry_run_prints_the_golden_scripts(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    # What packs files asks for it.
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115 - closed with the test's process
    text = printed(name, tmp_path / "home")
    assert "secret" not in text
    assert text == (GOLDEN / f"{name}.txt").read_text()


def test_a_trainer_that_may_do_with_fewer_nodes_asks_slurm_for_a_range(tmp_path, monkeypatch):
    recipe = llama3p3_70b.exprl(nodes=32)
    recipe.nodes.trainer_least = 10
    monkeypatch.setitem(CASES, "fewer", lambda: (recipe, cluster()))
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115 - closed with the test's process
    text = printed("fewer", tmp_path / "home")
    assert re.findall("^#SBATCH --nodes=(.*)$", text, re.MULTILINE) == ["10-20", "8", "4"]
    assert 'if [ "$SLURM_STEP_NUM_NODES" -lt 20 ]; then nodes=15 replicas=(policy.layout.dp=6); fi' in text


def test_the_guide_shows_the_dry_run_as_it_is():
    page = (ROOT / "docs" / "cluster.md").read_text()
    section = page[page.index("## 3.") : page.index("## 4.")]
    blocks = [textwrap.dedent(block).strip() for block in re.findall(r"(?:^(?: {4}.*)?\n)+", section, re.MULTILINE)]
    shown = [block for block in blocks if block and "recipes exprl_then_sparse_rl" not in block]
    assert len(shown) == 4
    whole = (GOLDEN / "container.txt").read_text()
    assert [block for block in shown if block not in whole] == []


if __name__ == "__main__":
    os.environ["HF_TOKEN"] = "secret"
    for case in CASES:
        with tempfile.TemporaryDirectory() as directory:
            (GOLDEN / f"{case}.txt").write_text(printed(case, Path(directory) / "home"))
