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


def test_the_runs_of_a_seed_differ_in_precision_and_directory_alone(study_fp8):
    study = yaml.safe_load(study_fp8.STUDY.read_text())
    runs = study_fp8.runs_of(study)
    assert len({run.directory for run in runs}) == len(runs) == len(study["seeds"]) * len(study["precisions"])
    runs = [run for run in runs if run.config.seed == run.seed == study["seeds"][0]]
    assert {run.config.policy.precision.kind for run in runs} == {
        "fp32",
        "fp8-delayed",
        "fp8-tensorwise",
        "fp8-blockwise",
        "mxfp8",
    }
    rest = [run.config.model_dump(exclude={"directory": True, "policy": {"precision"}}) for run in runs]
    assert all(tree == rest[0] for tree in rest)


@dataclass
class Finished:
    arm: str
    seed: int
    directory: Path
    evaluations: list[Path]


def test_a_row_tells_the_first_step_and_the_quarters(study_fp8, tmp_path):
    names = ("reward/mean", "entropy", "sampler_gap/mean", "sampler_gap/k3", "sampler_gap/max")
    parts = [((0.1, 0.5, 9e-2, 5e-2, 9.0), 1), ((0.2, 0.4, 1e-3, 1e-5, 0.1), 7)]
    parts += [((0.3, 0.3, 4e-3, 4e-5, 0.3), 16), ((0.5, 0.2, 3e-3, 2e-5, 0.2), 8)]
    steps = [dict(zip(names, step, strict=True)) | {"grad_norm": 1.0} for step, count in parts for _ in range(count)]
    lines = [json.dumps({"stage": "prime", "metrics": metrics}) for metrics in steps]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    evaluations = [tmp_path / "before.json", tmp_path / "after.json"]
    evaluations[0].write_text(json.dumps({"counts": {"a": [8, 0], "b": [8, 4]}}))
    evaluations[1].write_text(json.dumps({"counts": {"a": [8, 2], "b": [8, 6]}}))
    row = study_fp8.row(Finished("mxfp8", 1, tmp_path, evaluations))
    gaps = ["9.0e-02", "3.0e-03", "1.0e-05, 4.0e-05, 4.0e-05, 2.0e-05", "3.0e-01"]
    assert row == ["mxfp8", "1", "0.500", "0.200", "0.250 → 0.500", *gaps]
    assert study_fp8.table([row]).splitlines()[2] == f"| {' | '.join(row)} |"
