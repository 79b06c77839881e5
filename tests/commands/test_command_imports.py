"""Commands do not import what they do not need: torch, transformers, pandas and plotly take seconds of a start."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from exprl_megatron.judging.judgement import Scored
from exprl_megatron.rollout.group import GradedTrace, Group
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.runs.journal import Journal, SampledStep, write_step

SLOW = {"torch", "transformers", "pandas", "plotly", "nemo_run", "sglang", "datasets"}
CODE = """
import json, sys
from exprl_megatron import cli
try:
    cli.main()
except SystemExit as end:
    status = end.code
print(json.dumps([status, sorted(sys.modules)]), file=sys.stderr)
"""


def imported(*arguments: str, status: int = 0) -> set[str]:
    """Which of the slow packages a command imports."""
    done = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True, check=True)
    found, modules = json.loads(done.stderr.splitlines()[-1])
    assert (found or 0) == status, done.stderr
    return SLOW & set(modules)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    """A run with a step of both stages and an evaluation."""
    return str(write_run(tmp_path_factory.mktemp("run")))


def write_run(root: Path) -> Path:
    shared = {"steps": 9, "problems": {"source": "x.jsonl"}, "sampling": {"max_new_tokens": 64}}
    stages = [shared | {"kind": "sparse-rl", "name": "a"}, shared | {"kind": "my_code:Stage", "name": "own"}]
    tree = {"directory": str(root), "policy": {"model": "/nowhere/m", "max_tokens": 160}, "stages": stages}
    root.mkdir(exist_ok=True)
    (root / "config.yaml").write_text(yaml.safe_dump(tree))
    traces = (Trace("p", k, (1,), (2, 3), (-0.5, -0.5), "text", "stop", (("v0", 0, 2),)) for k in range(2))
    step = SampledStep([Group("p", tuple(GradedTrace(trace, Scored(float(trace.sample))) for trace in traces))], 1)
    for stage in ("a", "own"):
        Journal(root / "journal").write(stage, 1, step)
    write_step(root / "evaluations" / "start.parquet", step)
    return root


def test_show_imports_torch_for_advantages_alone(run):
    assert imported("show", run, "--stage", "a") == {"torch"}
    assert imported("show", run, "--stage", "own") == set()
    assert imported("show", run, "--evaluation", "start", "--json") == set()


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["judgement", "--run", "RUN", "--stage", "a"], 2),
        (["waterfall", "RUN"], 2),
        (["show", "nowhere"], 2),
        (["report", "nowhere", "--out", "x.html"], 2),
        (["eval", "nowhere", "--problems", "nowhere"], 2),
        (["plan", "llama-3.3-70b", "--gpus", "64"], 0),
        (["plan", "recipes/configs/demo.yaml", "--json"], 0),
        (["plan", "--against", "RUN"], 2),
        (["--version"], 0),
    ],
)
def test_other_commands_import_none_before_they_need_them(run, arguments, status):
    assert imported(*(run if argument == "RUN" else argument for argument in arguments), status=status) == set()


def test_a_report_imports_torch_for_advantages_and_tokenizers_alone(tmp_path):
    run, page = write_run(tmp_path / "run"), str(tmp_path / "page.html")
    # No tokenizer is at the policy's path; Plotly's program is a part of the page.
    assert imported("report", str(run), "--out", page) == {"torch", "plotly"}
    shutil.rmtree(run / "journal" / "a")
    assert imported("report", str(run), "--out", page) == {"plotly"}
