import json
import runpy
from pathlib import Path

import pytest
from benchmarks.host.replies import body
from benchmarks.host.station import measure, stations
from benchmarks.host.workload import Workload

from exprl_megatron.serving.generation import read_generation

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", [name for name in stations() if name != "judging by prefixes"])
def test_every_station_has_a_cost(name):
    cost = measure(stations()[name], Workload(32, 100))
    assert (cost.station, cost.traces, cost.mean_tokens) == (name, 32, 100)
    assert cost.cpu_s > 0 and cost.kernel_s >= 0 and 0.9 * 3200 < cost.tokens < 1.1 * 3200


def test_a_prepared_reply_is_the_trace():
    trace = Workload(16, 300).groups[0].samples[3].trace
    found = read_generation(body(trace))
    assert found.token_ids.tobytes() == trace.token_ids.tobytes()
    assert found.log_probs.tobytes() == trace.log_probs.tobytes()


def test_the_table_has_growth_and_the_share_of_what_the_trainer_waits_for():
    table = runpy.run_path(str(ROOT / "tools" / "bench_host.py"))["table"]
    sizes = {"512x2000": (512, 1.01), "2048x2000": (2048, 4.04), "2048x16000": (2048, 32.32)}
    cost = {
        size: {
            "cpu_s": cpu_s,
            "kernel_s": cpu_s / 4,
            "traces": n,
            "tokens": n * int(size.split("x")[1]),
            "peak_mb": 7.0,
        }
        for size, (n, cpu_s) in sizes.items()
    }
    *_, blocking, other, total = table({"a": cost, "b": cost}, {"a": True, "b": False}).splitlines()
    assert blocking.endswith("| 986 | 247 | 1.00 | 1.00 | 1.00% |")
    assert other.endswith("| 1.00 | 1.00 | not waited for |")
    assert total.endswith("| **1.00%** |")


def test_the_command_measures_each_size_in_a_process_of_its_own(tmp_path, capsys):
    main = runpy.run_path(str(ROOT / "tools" / "bench_host.py"))["main"]
    sizes = ["16x50", "32x50"]
    main(["--sizes", *sizes, "--stations", "plan of micro-batches", "--json", str(tmp_path / "costs.json")])
    assert "| plan of micro-batches |" in capsys.readouterr().out
    costs = json.loads((tmp_path / "costs.json").read_text())
    assert [cost["traces"] for cost in costs["plan of micro-batches"].values()] == [16, 32]


def test_replies_with_routed_experts_have_a_size_and_a_cost(capsys):
    main = runpy.run_path(str(ROOT / "tools" / "bench_router_replay.py"))["main"]
    main(["--tokens", "24", "--repeats", "1"])
    _, _, *rows, _, _ = capsys.readouterr().out.splitlines()
    sizes = [int(row.split(" | ")[1].replace(",", "")) for row in rows]
    assert [row.split(" | ")[0] for row in rows] == ["| without experts", "| int32", "| uint8"]
    # All but the same few bytes is base64 of four bytes an id, or of one.
    assert (sizes[1] - sizes[0]) == pytest.approx(4 * (sizes[2] - sizes[0]), rel=0.01)
