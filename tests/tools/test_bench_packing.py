"""tools/bench_packing.py: packed and padded steps do the same work, and the report says what padding each has."""

import json

import bench_packing
import pytest


def test_both_ways_have_the_same_loss_and_gradient_and_the_shares_of_padding_are_next_to_the_ratio(
    tiny_model, tmp_path, capsys
):
    sizes = "--sequences 12 --median 20 --longest 64 --micro-batch-tokens 128 --rounds 2"
    bench_packing.main(f"--model {tiny_model('qwen3')} {sizes} --json {tmp_path / 'f.json'}".split())
    found = json.loads((tmp_path / "f.json").read_text())
    packed, padded = found["packed"], found["padded"]
    assert packed["loss"] == pytest.approx(padded["loss"], rel=1e-5)
    assert packed["grad_norm"] == pytest.approx(padded["grad_norm"], rel=1e-5)
    assert packed["padding"] == 0 < padded["padding"]
    seconds = zip(packed["wall_s"], padded["wall_s"], strict=True)
    assert found["ratio"] == pytest.approx(sum(b / a for a, b in seconds) / 2)
    told = capsys.readouterr().out
    assert f"{padded['padding']:5.1%}" in told
    assert f"packed / padded, tokens per second: {found['ratio']:.2f}" in told
