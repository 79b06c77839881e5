"""A run that samples ahead, on a real server: staleness, traces of several weight versions, kill -9, failures."""

import asyncio
import filecmp
import json
import shutil
import threading
import time
from contextlib import contextmanager

import psutil
import pytest
from helpers.processes import wait_until
from helpers.runs import finish, held_out, kill_when, run_config, start_ranks, write_problems

from exprl_megatron.errors import RunStopped
from exprl_megatron.problems.order import problem_indices
from exprl_megatron.reporting.metrics import read_metrics
from exprl_megatron.runs.directory import RunDirectory
from exprl_megatron.runs.journal import Journal
from exprl_megatron.serving.registry import Registry

pytestmark = pytest.mark.slow

STEPS, PROBLEMS, STALENESS = 6, 12, 2


def _config(root, model, steps=STEPS, **changes):
    """Sparse-reward RL, two steps ahead; an untrained model solves nothing, so that the bonus alone moves weights."""
    stage = {
        "kind": "sparse-rl",
        "name": "ahead",
        "steps": steps,
        "problems": {"source": str(write_problems(root / "problems.jsonl", PROBLEMS))},
        "problems_per_step": 2,
        "group_size": 3,
        "max_staleness": STALENESS,
        "sampling": {"temperature": 1.0, "max_new_tokens": 100},
        "loss": {"entropy_coefficient": 0.5, "correction": {"kind": "truncated", "level": "sequence"}},
        "optimizer": {"lr": 1e-3},
    }
    return run_config(root / "run", model, model, root / "problems.jsonl", stages=[stage], **changes)


@contextmanager
def throttled(server):
    """The server stands still for most of the time, so that sampling is slower than learning on any machine."""
    processes = psutil.Process(server.pid).children(recursive=True)
    done = threading.Event()

    def alternate():
        while not done.is_set():
            for process in processes:
                process.suspend()
            done.wait(0.15)
            for process in processes:
                process.resume()
            done.wait(0.05)

    thread = threading.Thread(target=alternate)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.fixture(scope="module")
def killed_run(trained_server, tiny_model, tmp_path_factory):
    """Killed while steps were in flight and one was sampled that had not been learned from, then taken to its end."""
    root = tmp_path_factory.mktemp("killed")
    config = _config(root, tiny_model("qwen3"), evaluation=held_out(root / "problems.jsonl", 2))
    paths = RunDirectory(config.directory)
    journal = Journal(paths.journal)
    with throttled(trained_server):
        ranks = start_ranks(config, {"policy": trained_server})
        kill_when(ranks, lambda: paths.metrics.is_file() and journal.path("ahead", 3).is_file())
        kept = {step: journal.path("ahead", step).read_bytes() for step in journal.steps("ahead")}
        finish(start_ranks(config, {"policy": trained_server}, resume=True))
    assert kept == {step: journal.path("ahead", step).read_bytes() for step in kept}, "a step was sampled twice"
    return config


def _metrics(config):
    """Of every step; the record of step 0 is an evaluation."""
    records = read_metrics(RunDirectory(config.directory).metrics)
    return [record["metrics"] for record in records if record["step"]]


def _mixed(config):
    """Whether a trace has tokens of several weight versions."""
    return any(step["staleness/mixed"] > 0 for step in _metrics(config))


def test_every_step_is_learned_once_from_the_problems_that_are_its_own(killed_run):
    journal = Journal(RunDirectory(killed_run.directory).journal)
    assert len(_metrics(killed_run)) == STEPS
    assert journal.steps("ahead") == list(range(1, STEPS + 1))
    for step in range(1, STEPS + 1):
        groups = journal.read("ahead", step).groups
        indices = problem_indices(killed_run.seed, "ahead", 2 * (step - 1), 2, PROBLEMS)
        assert [group.problem_id for group in groups] == [f"p{i}" for i in indices]
        assert all(len(group.samples) == 3 for group in groups)


def test_held_out_problems_are_evaluated_under_one_version_while_steps_are_sampled_ahead(killed_run):
    paths = RunDirectory(killed_run.directory)
    found = {
        str(path.relative_to(paths.evaluations)): json.loads(path.read_text())["weight_version"]
        for path in paths.evaluations.rglob("*.json")
    }
    expected = {"start.json": "v0", "ahead/step-2.json": "v2", "ahead/step-4.json": "v4", "ahead.json": f"v{STEPS}"}
    assert found == expected
    records = read_metrics(paths.metrics)
    assert [r["step"] for r in records if "evaluation/pass@1" in r["metrics"]] == [0, 2, 4, STEPS]


def test_no_token_is_older_than_allowed_and_weights_changed_in_mid_generation(killed_run):
    metrics = _metrics(killed_run)
    oldest = [step["staleness/max"] for step in metrics]
    assert 0 < max(oldest) <= STALENESS
    assert _mixed(killed_run)
    assert all(0 < step["correction/effective"] < 1 + 1e-6 for step in metrics)
    journal = Journal(RunDirectory(killed_run.directory).journal)
    for step in range(1, STEPS + 1):
        for trace in (member.trace for group in journal.read("ahead", step).groups for member in group.samples):
            versions = [int(version[1:]) for version, _, _ in trace.weight_versions]
            assert step - 1 - STALENESS <= versions[0] and versions == sorted(versions) and versions[-1] <= step - 1
            bounds = [0, *(end for _, _, end in trace.weight_versions)]
            assert bounds == [*(start for _, start, _ in trace.weight_versions), len(trace.token_ids)]


def test_the_sampler_s_log_probs_are_those_of_the_trainer_where_no_update_is_between(killed_run):
    compared = [step for step in _metrics(killed_run) if "sampler_gap/mean" in step]
    assert max(step["sampler_gap/mean"] for step in compared) < 1e-4
    # Tokens of older weights are left out.
    assert min(step.get("sampler_gap/tokens", 0) / step["tokens"] for step in _metrics(killed_run)) < 1
    journal = Journal(RunDirectory(killed_run.directory).journal)
    for step, metrics in enumerate(_metrics(killed_run), 1):
        traces = [member.trace for group in journal.read("ahead", step).groups for member in group.samples]
        spans = [span for trace in traces for span in trace.weight_versions]
        fresh = sum(end - start for version, start, end in spans if version == f"v{step - 1}")
        assert metrics.get("sampler_gap/tokens", 0) == fresh
    assert any(step["correction/ratio/max"] > 1.01 for step in _metrics(killed_run))


def test_from_the_same_journal_an_uninterrupted_run_leaves_the_same_weights(killed_run, trained_server, tmp_path):
    config = killed_run.model_copy(update={"directory": str(tmp_path / "run")})
    paths, killed = RunDirectory(config.directory), RunDirectory(killed_run.directory)
    paths.claim(config, resume=False).release()
    shutil.copytree(killed.journal, paths.journal, dirs_exist_ok=True)
    finish(start_ranks(config, {"policy": trained_server}, resume=True))
    name = "ahead/model.safetensors"
    assert filecmp.cmp(paths.models / name, killed.models / name, shallow=False)


def test_traces_held_in_place_continue_those_cut_off_are_sampled_again_and_without_a_server_the_run_ends(
    trained_server, tiny_model, tmp_path, capfd
):
    alone = {"model": str(tiny_model("qwen3")), "max_tokens": 160}
    config = _config(
        tmp_path,
        tiny_model("qwen3"),
        steps=1000,
        policy=alone,
        sync={"pause_mode": "in_place"},
        # On a loaded machine a server whose requests were cut off takes a while to be healthy again.
        server={"start_deadline_s": 90},
    )
    ranks = start_ranks(config, {"policy": trained_server})
    metrics = RunDirectory(config.directory).metrics
    wait_until(
        lambda: (metrics.is_file() and _mixed(config) and len(_metrics(config)) >= 6) or not ranks.running(), 300
    )

    async def abort():
        async with trained_server.client() as client:
            # A pause in the mode abort would never be answered where the trainer has paused the same server in place:
            # SGLang then waits for requests that go on only after a continue_generation, which waits for that pause.
            await client._post("/abort_request", {"rid": "", "abort_all": True})

    said = ""

    def cut_off():
        """Whether a request was in flight when it was tried, which the trainer then says of the server."""
        nonlocal said
        asyncio.run(abort())
        time.sleep(0.1)
        said += capfd.readouterr().out
        return "policy-0 is unhealthy" in said or not ranks.running()

    wait_until(cut_off, 300)
    learned = len(_metrics(config))
    # What was cut off is sampled again.
    wait_until(lambda: len(_metrics(config)) >= learned + 4 or not ranks.running(), 600)
    Registry(RunDirectory(config.directory).registry).withdraw("policy-0")
    with pytest.raises(RunStopped, match=r"no policy server for start_deadline_s \(90 s\)"):
        finish(ranks)
    ranks.stop()
    assert _mixed(config)
