"""tools/bench_step.py: both steps do the same work, and the report names what was compared."""

import json

import bench_step
import pytest
from benchmarks.step_comparison import Comparison, compare_steps, make_sequences


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_both_steps_have_the_same_loss_and_gradient(tiny_model, architecture):
    sequences = make_sequences(128, count=5, longest=40, spread=0.7)
    found = compare_steps(tiny_model(architecture, tied=True), sequences, budget=100, rounds=1)
    assert found.first_losses[0] == pytest.approx(found.first_losses[1], rel=1e-5)
    assert found.first_norms[0] == pytest.approx(found.first_norms[1], rel=1e-4)


def test_the_ratio_is_of_neighboring_steps():
    found = Comparison(10, (1.0, 2.0, 4.0), (1.0, 4.0, 4.0), (1.0,) * 3, (0.5,) * 3, (0.0, 0.0), (0.0, 0.0))
    assert (found.ratio, found.cpu_ratio) == (1.0, 0.5)


def test_the_report_has_both_shapes(tiny_model, tmp_path, capsys):
    model = tiny_model("qwen3")
    sizes = "--sequences 2 --longest 16 --rounds 1"
    bench_step.main(f"--model {model} {sizes} --profile --json {tmp_path / 'f.json'}".split())
    told = capsys.readouterr().out
    assert "aten::mm" in told
    found = json.loads((tmp_path / "f.json").read_text())
    assert [(f["shape"], f["tokens"], len(f["ours_s"])) for f in found] == [("one length", 32, 1), ("long tail", 20, 1)]
