"""Small real runs of two ranks (SFT, no server) under what goes wrong on a cluster: one sentence each, nothing left."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from helpers.processes import family, left_behind, wait_until
from helpers.runs import command_words

from exprl_megatron.config.load import check_config
from exprl_megatron.policy.checkpoint_files import checkpoints
from exprl_megatron.runs.directory import RunDirectory

pytestmark = pytest.mark.slow


class Launched:
    """`exprl train` on a config of two ranks, started again and again in one directory."""

    def __init__(self, root: Path, model: Path):
        examples = root / "examples.jsonl"
        examples.write_text(json.dumps({"prompt": "What is 1 plus 1?", "completion": "It is 2."}) + "\n")
        self.tree = {
            "directory": str(root / "run"),
            "policy": {"model": str(model), "layout": {"dp": 2}, "max_tokens": 128},
            "checkpoint": {"every_steps": 1, "keep": 3},
            "stages": [
                {"kind": "sft", "name": "sft", "steps": 100_000, "batch_size": 2, "examples": str(examples)},
            ],
        }
        check_config(self.tree, "test")
        self.paths = RunDirectory(self.tree["directory"])
        self.process: subprocess.Popen | None = None

    def start(self, *flags: str) -> None:
        path = self.paths.root.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(self.tree))
        command = [sys.executable, "-m", "exprl_megatron.cli", "train", str(path), *flags]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell's background jobs ignore it, and so would we.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def steps(self) -> int:
        return self.paths.metrics.read_text().count("\n") if self.paths.metrics.is_file() else 0

    def learn(self, steps: int = 2) -> dict[int, psutil.Process]:
        """Wait for so many further steps; the ranks."""
        wanted = self.steps() + steps
        wait_until(lambda: self.steps() >= wanted or self.process.poll() is not None, 600)
        assert self.process.poll() is None, self.process.communicate()
        commands = {p: command_words(p) for p in self.everyone()}
        # A title ends with the name, `(trainer-0)`.
        return {
            int(words[-1].strip("()").rpartition("-")[2]): process
            for process, words in commands.items()
            if words[2:3] == ["exprl_megatron.training.worker"]
        }

    def everyone(self) -> list[psutil.Process]:
        return family(self.process.pid)

    def end(self, timeout_s: float = 300) -> tuple[int, str, str]:
        """Status and output; no process may be left."""
        out, errors = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, out, errors


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    launched = Launched(tmp_path_factory.mktemp("faulty"), tiny_model("qwen3"))
    yield launched
    if launched.process is not None and launched.process.poll() is None:
        launched.process.kill()


def nothing_left(everyone: list[psutil.Process]) -> bool:
    return not left_behind(everyone)


def test_the_rank_that_was_killed_is_named_and_not_the_connection_that_the_other_lost(run):
    run.start()
    ranks, everyone = run.learn(3), run.everyone()
    ranks[0].kill()
    status, _, errors = run.end()
    assert status == 1
    assert "exprl: trainer-0 was killed by signal 9 (SIGKILL)" in errors and "continue with --resume" in errors
    assert "gloo" not in errors.splitlines()[0] and errors.startswith("exprl: ")
    assert nothing_left(everyone)
    record = json.loads(run.paths.record.read_text())
    assert record["exit"]["status"] == 1 and "trainer-0 was killed" in record["exit"]["message"]


def test_a_damaged_checkpoint_is_named_and_the_run_continues_from_the_one_before(run):
    *_, before, newest = checkpoints(run.paths.checkpoints)
    shard = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    run.start("--resume")
    ranks, everyone = run.learn(), run.everyone()
    ranks[1].send_signal(signal.SIGSTOP)
    status, out, errors = run.end()
    assert re.search(rf"{newest.name} is damaged \({shard.name} holds other bytes.*continues from {before.name}\.", out)
    assert (newest.with_name(newest.name + ".damaged")).is_dir()
    # The same rank, and as it was not dead, only a missing heartbeat shows it.
    assert status == 1
    assert re.match(r"exprl: trainer-1 .* has sent no heartbeat for 45 s, its state is stopped; check what", errors)
    assert nothing_left(everyone)


def test_ctrl_c_twice_says_what_to_type_and_leaves_nothing(run):
    run.start("--resume", "checkpoint.keep=2")
    run.learn(1)
    everyone = run.everyone()
    os.kill(run.process.pid, signal.SIGINT)
    time.sleep(0.1)
    os.kill(run.process.pid, signal.SIGINT)
    status, _, errors = run.end()
    assert status == 130
    path = run.paths.root.with_suffix(".yaml")
    typed = f"exprl train {path} --resume checkpoint.keep=2"
    assert f"exprl: Stopped by Ctrl-C, and so is all that it had started; continue with `{typed}`.\n" in errors
    assert "Traceback" not in errors
    assert nothing_left(everyone)
    record = json.loads(run.paths.record.read_text())
    assert record["exit"]["status"] == 130
    assert [attempt["exit"]["status"] for attempt in record["earlier"]] == [1, 1]


def catches_sigterm(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(re.search(r"^SigCgt:\s*(\w+)", status, re.MULTILINE)[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("after_s", [0.2, 2.0])
def test_sigterm_while_it_starts_is_one_sentence_and_leaves_nothing(run, after_s):
    run.start("--resume")
    wait_until(lambda: catches_sigterm(run.process.pid), 300)
    time.sleep(after_s)
    everyone = run.everyone()
    os.kill(run.process.pid, signal.SIGTERM)
    status, _, errors = run.end()
    assert status == 143
    assert re.fullmatch(r"exprl: Stopped by SIGTERM, and so is all that .*; continue with `.* --resume`\.\n", errors)
    assert nothing_left(everyone)


def test_a_gradient_that_is_not_finite_stops_a_run_once(tmp_path, tiny_model):
    launched = Launched(tmp_path, tiny_model("qwen3"))
    launched.tree["policy"]["layout"]["dp"] = 1
    # Weights of such a size overflow in the second step.
    launched.tree["stages"][0] |= {"steps": 2, "optimizer": {"lr": 1e30}}
    launched.start()
    status, _, errors = launched.end(600)
    assert status == 1
    assert re.match(
        r"exprl: The gradient norm of update 2 is nan in step 2 of sft; the weights are unchanged\.", errors
    )
    assert "--resume continues without this update" in errors
    launched.start("--resume")
    status, out, errors = launched.end(600)
    assert (status, errors) == (0, "")
    assert "The gradient norm of update 2 is nan again; step 2 of sft is skipped" in out
    last = json.loads(launched.paths.metrics.read_text().splitlines()[-1])
    assert last["step"] == 2 and last["metrics"]["update_skipped"] == 1 and last["metrics"]["grad_norm"] is None
