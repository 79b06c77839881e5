import json
import subprocess
import sys
from pathlib import Path

import pytest

from exprl_megatron.benchmarks.host.replies import body
from exprl_megatron.benchmarks.host.station import measure, stations
from exprl_megatron.benchmarks.host.workload import Workload
from exprl_megatron.serving.generation import read_generation

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", stations())
def test_every_station_has_a_cost(name):
    cost = measure(stations()[name], Workload(32, 100))
    assert (cost.station, cost.traces, cost.mean_tokens) == (name, 32, 100)
    assert cost.cpu_s > 0 and 0.9 * 3200 < cost.tokens < 1.1 * 3200


def test_a_prepared_reply_is_the_trace():
    trace = Workload(16, 300).groups[0].members[3].trace
    found = read_generation(body(trace))
    assert found.token_ids.tobytes() == trace.token_ids.tobytes()
    assert found.log_probs.tobytes() == trace.log_probs.tobytes()


def test_the_command_prints_a_row_for_each_station_and_adds_up_what_the_trainer_waits_for(tmp_path):
    command = [sys.executable, "tools/bench_host.py", "--sizes", "16x50", "--json", str(tmp_path / "costs.json")]
    names = ["plan of micro-batches", "replies to arrays"]
    done = subprocess.run([*command, "--stations", *names], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        *(f"| {n}" for n in names),
        "| **all that the trainer waits for**",
    ]
    assert list(json.loads((tmp_path / "costs.json").read_text())) == names
