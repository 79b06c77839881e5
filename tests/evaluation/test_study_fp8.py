"""The study of emulated FP8 recipes: its runs, and its table against numbers by hand."""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def study_fp8(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    spec = importlib.util.spec_from_file_location("study_fp8", ROOT / "tools" / "study_fp8.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_runs_differ_in_precision_and_directory_alone(study_fp8):
    runs = study_fp8.runs_of(yaml.safe_load(study_fp8.STUDY.read_text()))
    assert {run.config.policy.precision.kind for run in runs} == {
        "fp32",
        "fp8-delayed",
        "fp8-tensorwise",
        "fp8-blockwise",
        "mxfp8",
    }
    assert len({run.directory for run in runs}) == len(runs)
    rest = [run.config.model_dump(exclude={"directory": True, "policy": {"precision"}}) for run in runs]
    assert all(tree == rest[0] for tree in rest)


@dataclass
class Finished:
    arm: str
    directory: Path
    evaluations: list[Path]


def test_a_row_tells_the_first_step_from_the_later_ones(study_fp8, tmp_path):
    steps = [(0.1, 9e-2, 9.0, 50.0), (0.2, 1e-3, 0.1, 2.0), (0.4, 3e-3, 0.3, 4.0), (0.6, 2e-3, 0.2, 3.0)]
    names = ("reward/mean", "sampler_gap/mean", "sampler_gap/max", "grad_norm")
    lines = [json.dumps({"stage": "prime", "metrics": dict(zip(names, step, strict=True))}) for step in steps]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    evaluations = [tmp_path / "before.json", tmp_path / "after.json"]
    evaluations[0].write_text(json.dumps({"counts": {"a": [8, 0], "b": [8, 4]}}))
    evaluations[1].write_text(json.dumps({"counts": {"a": [8, 2], "b": [8, 6]}}))
    row = study_fp8.row(Finished("mxfp8", tmp_path, evaluations))
    assert row == ["mxfp8", "0.400", "0.250 → 0.500", "9.0e-02", "2.0e-03", "3.0e-01", "3.000"]
    assert study_fp8.table([row]).splitlines()[2] == f"| {' | '.join(row)} |"
