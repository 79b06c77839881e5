"""What a user sees who types something wrong: one sentence, exit status 2, nothing written."""

import errno
import json
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest
import yaml

from exprl_megatron import cli
from exprl_megatron.launch import launcher
from exprl_megatron.launch.input_hashes import hash_inputs
from exprl_megatron.launch.preflight import check_inputs
from exprl_megatron.processes.starter import Starter


@pytest.fixture
def run(tmp_path, tiny_model):
    """`run(changes) -> (status, stderr)` of `exprl train` on a config that is sound but for `changes`."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps({"id": "a", "problem": "1 + 1?", "reference": "It is 2.", "answer": "2"}) + "\n")
    tree = {
        "directory": str(tmp_path / "run"),
        "policy": {"model": str(tiny_model("qwen3")), "max_tokens": 128},
        "stages": [
            {
                "kind": "sparse-rl",
                "name": "sparse",
                "steps": 1,
                "problems": {"source": str(problems)},
                "sampling": {"max_new_tokens": 16},
            }
        ],
    }

    def call(monkeypatch, capsys, *overrides: str) -> tuple[int, str]:
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(tree))
        monkeypatch.setattr(sys, "argv", ["exprl", "train", str(config), *overrides])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr().err

    call.tree = tree
    call.directory = tmp_path / "run"
    call.problems = problems
    return call


@pytest.fixture
def nothing_preloaded(monkeypatch):
    """The inputs are checked by a process that imports for itself, as where CUDA is."""
    monkeypatch.setattr(launcher, "starter", lambda *_, **__: Starter())


@pytest.fixture
def checked_here(monkeypatch):
    """The inputs are checked in this process, which has the libraries."""

    def check(config, _):
        check_inputs(config)
        return hash_inputs(config)

    monkeypatch.setattr(launcher, "hash_checked_inputs", check)


def refused(run, monkeypatch, capsys, *overrides: str) -> str:
    """The one sentence of a refusal; nothing may have been written."""
    status, told = run(monkeypatch, capsys, *overrides)
    assert status == 2
    assert told.startswith("exprl: ")
    assert told.count("\n") == 1, told
    assert not run.directory.exists()
    return told


def test_an_unknown_key_is_refused_with_the_nearest_name(run, monkeypatch, capsys):
    told = refused(run, monkeypatch, capsys, "policy.layuot.tp=2")
    assert "unknown key policy.layuot; did you mean 'layout'?" in told


def test_a_value_of_the_wrong_type_is_refused(run, monkeypatch, capsys):
    assert "stages.0.steps is 'many'" in refused(run, monkeypatch, capsys, "stages.0.steps=many")


def test_tp_that_does_not_divide_the_heads_is_refused(run, monkeypatch, capsys):
    run.tree["policy"]["layout"] = {"tp": 4}
    told = refused(run, monkeypatch, capsys)
    assert "policy.layout.tp is 4, which does not divide the model's 2 KV groups; use one of 1, 2." in told


def test_all_that_is_illegal_is_said_at_once_whether_the_config_or_the_model_forbids_it(run, monkeypatch, capsys):
    layout = {"tp": 4, "vpp": 3, "ep": 3}
    run.tree["policy"] |= {"layout": layout, "max_tokens": 4096, "precision": {"kind": "fp32", "first_last_bf16": 1}}
    run.tree["stages"][0] |= {"optimizer": {"distributed": False, "overlap": True}, "updates_per_step": 5}
    status, told = run(monkeypatch, capsys, "policy.layuot.tp=2")
    assert status == 2 and not run.directory.exists()
    for sentence in (
        "unknown key policy.layuot; did you mean 'layout'?",
        "policy.layout.vpp is 3 but pp is 1; virtual stages need pp of 2 or more.",
        "policy.layout.ep x etp is 3, which does not divide the 4 ranks of a pipeline stage",
        "policy.layout.ep with tp needs sequence_parallel; turn it on.",
        "stage sparse: problems_per_step (32) is not a multiple of updates_per_step (5)",
        "optimizer.overlap needs optimizer.distributed",
        "policy.layout.tp is 4, which does not divide the model's 2 KV groups; use one of 1, 2.",
        "policy.layout.ep is 3 but the model has no experts; set it to 1.",
        "policy.layout.pp x vpp is 3, which does not divide the model's 2 layers; change pp or vpp.",
        "policy.precision.first_last_bf16 is 1 but the precision fp32 multiplies nothing in 8 bits",
        "policy.max_tokens is 4096, more than the 1024 positions",
    ):
        assert sentence in told
    assert told.count("\n") == 11, told


def test_a_model_without_weights_is_refused(nothing_preloaded, run, monkeypatch, capsys, tmp_path):
    model = tmp_path / "bare"
    model.mkdir()
    shutil.copyfile(Path(run.tree["policy"]["model"]) / "config.json", model / "config.json")
    told = refused(run, monkeypatch, capsys, f"policy.model={model}")
    assert "bare holds no safetensors weights; fetch the model again." in told


@pytest.mark.slow
def test_a_truncated_safetensors_file_is_refused(run, monkeypatch, capsys, tmp_path):
    model = tmp_path / "cut"
    shutil.copytree(run.tree["policy"]["model"], model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors" in refused(run, monkeypatch, capsys, f"policy.model={model}")


def test_more_tokens_than_the_model_has_positions_are_refused(run, monkeypatch, capsys):
    told = refused(run, monkeypatch, capsys, "policy.max_tokens=4096")
    assert "policy.max_tokens is 4096, more than the 1024 positions" in told


def test_an_unknown_architecture_is_refused(run, monkeypatch, capsys, tmp_path):
    model = tmp_path / "other"
    shutil.copytree(run.tree["policy"]["model"], model)
    config = json.loads((model / "config.json").read_text()) | {"architectures": ["MambaForCausalLM"]}
    (model / "config.json").write_text(json.dumps(config))
    told = refused(run, monkeypatch, capsys, f"policy.model={model}")
    assert (
        "MambaForCausalLM, which is not supported; the nearest supported one is LlamaForCausalLM, and docs/models.md"
        in told
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{}}\n", "line 1: this is not JSON"),
        ("", "is empty; give one with at least one problem."),
        ('{"id": "a", "reference": "r", "answer": "1"}\n', "line 1: the field 'problem' is missing"),
        ('{"id": "a", "problem": "p", "reference": "r", "answer": "1"}\n' * 2, "line 2: the id 'a' also occurs at"),
    ],
    ids=["bad line", "empty", "missing field", "duplicate ids"],
)
def test_a_faulty_problem_file_is_refused(run, monkeypatch, capsys, content, sentence):
    run.problems.write_text(content)
    assert sentence in refused(run, monkeypatch, capsys)


@pytest.mark.slow
def test_a_directory_that_holds_another_run_is_left_as_it_is(run, monkeypatch, capsys):
    run.directory.mkdir()
    (run.directory / "config.yaml").write_text("seed: 7\n")
    (run.directory / "metrics.jsonl").write_text("{}\n")
    status, told = run(monkeypatch, capsys)
    assert status == 2
    assert "already holds a run; continue with it by --resume" in told
    assert sorted(path.name for path in run.directory.iterdir()) == ["config.yaml", "metrics.jsonl"]
    assert (run.directory / "config.yaml").read_text() == "seed: 7\n"


def test_a_port_in_use_is_refused(nothing_preloaded, checked_here, run, monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        told = refused(run, monkeypatch, capsys, f"server.port={port}")
    assert f"Port {port}, configured for policy-0, is in use" in told


@pytest.mark.slow
def test_a_set_of_prompts_that_are_all_too_long_ends_the_run_with_their_count(run, monkeypatch, capsys):
    run.tree["stages"][0]["problems"]["max_prompt_tokens"] = 3
    status, told = run(monkeypatch, capsys)
    assert status == 2
    assert "None of the 1 problems has a prompt of at most 3 tokens" in told


def test_a_dry_run_prints_config_and_processes_and_starts_nothing(run, monkeypatch, capsys, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(run.tree))
    monkeypatch.setattr(sys, "argv", ["exprl", "train", str(config), "policy.layout.tp=2", "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert yaml.safe_load(printed.partition("\n\n")[0])["policy"]["layout"]["tp"] == 2
    assert all(name in printed for name in ("policy-0", "trainer-0", "trainer-1"))
    assert not run.directory.exists()


def test_a_dry_run_refuses_what_a_start_on_this_machine_refuses(run, monkeypatch, capsys):
    """GPUs that are too few, and a port in use; registered servers are placed elsewhere."""
    with monkeypatch.context() as patched:
        patched.setattr("exprl_megatron.launch.launcher.gpu_count", lambda: 1)
        status, told = run(monkeypatch, capsys, "server.count=2", "--dry-run")
        placed_elsewhere, _ = run(monkeypatch, capsys, "server.count=2", "--dry-run", "--servers", "registered")
        assert placed_elsewhere == 0
        assert status == 2 and "of 1; reduce policy.layout or the servers' count or tp" in told
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, told = run(monkeypatch, capsys, f"server.port={port}", "--dry-run")
        assert status == 2 and f"Port {port}, configured for policy-0, is in use" in told
    assert not run.directory.exists()


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_start_is_one_sentence(run, monkeypatch, capsys):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    status, told = run(monkeypatch, capsys)
    assert status == 2
    assert told == f"exprl: Cannot use {run.directory} (No space left on device); make room there, then start again.\n"


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--resume",)])
def test_a_directory_that_cannot_be_written_to_is_one_sentence(run, monkeypatch, capsys, flags):
    status, told = run(monkeypatch, capsys, "directory=/sys/run", *flags)
    assert status == 2
    said = "There is no run in /sys/run" if flags else "Cannot use /sys/run ("
    assert told.startswith(f"exprl: {said}") and told.count("\n") == 1
