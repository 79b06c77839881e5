"""tools/bench_judging_host.py at a size at which it shows nothing but that it runs."""

import json
from pathlib import Path

import bench_judging_host
import pytest
from benchmarks.host.station import measure, stations
from benchmarks.host.workload import Workload
from helpers.tokenizer_rules import tokenizer_of


def figures(tmp_path: Path, *arguments: str) -> dict:
    bench_judging_host.main([*arguments, "--json", str(tmp_path / "figures.json")])
    return json.loads((tmp_path / "figures.json").read_text())


@pytest.mark.slow
def test_traces_are_judged_while_replies_come_in_and_the_lag_is_measured(tmp_path):
    tokenizer_of("qwen").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    sizes = ("--model", str(tmp_path), "--traces", "3", "--tokens", "500")
    found = figures(tmp_path, "loop", *sizes, "--seconds", "0.5")
    assert found["traces"] == 16 and found["seconds"] >= 0.3
    assert found["loop_busy_max_s"] > 0 and found["lag_max_s"] > 0
    assert figures(tmp_path, "prefixes", *sizes)["cpu_ms_a_trace"] > 0
    cost = measure(stations()["judging by prefixes"], Workload(8, 200, tmp_path))
    assert cost.cpu_s > 0 and cost.traces == 8


def test_the_store_grows_to_the_rows_asked_for(tmp_path):
    found = figures(tmp_path, "store", "--rows", "1500")
    assert found["rows"][-1] == 1500 and len(found["find_ms"]) == 4
