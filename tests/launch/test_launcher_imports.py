"""The launcher computes nothing, and holds no library that computes."""

import json
import subprocess
import sys

HEAVY = ("torch", "transformers", "sglang", "megatron", "datasets", "pandas", "scipy", "numpy", "pyarrow")

# All of a launch but the processes: the check of the inputs answers, the servers and ranks are not started.
LAUNCH = """
import json, sys
from pathlib import Path
import exprl_megatron.processes.starter as starter
from exprl_megatron import cli
from exprl_megatron.launch import input_checks
from exprl_megatron.launch import launcher as launch
from exprl_megatron.launch import starting

class Process:
    pid, returncode = 1, 0
    poll = wait = lambda self, timeout=None: 0
    kill = terminate = lambda self: None

started = []
def start(self, name, command, *_, **__):
    started.append(name)
    return Process()

starter.Starter.start = start
starting.ForkServer = lambda *_: type("FakeForkServer", (), {"close": lambda self: None})()
launch.hash_checked_inputs = lambda config, start: {}
sys.argv = ["exprl", "train", *sys.argv[1:]]
try:
    cli.main()
finally:
    print(json.dumps([started, sorted(sys.modules)]))
"""


def test_a_launch_imports_no_library_that_computes(tmp_path):
    command = [sys.executable, "-c", LAUNCH, "recipes/configs/demo.yaml", f"directory={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    started, modules = json.loads(done.stdout.splitlines()[-1])
    assert {"policy-0", "judge-0", "trainer-0", "trainer-1"} <= set(started), done.stderr
    assert [name for name in HEAVY if name in modules] == []
