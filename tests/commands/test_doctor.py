import functools
import json

import pytest

from exprl_megatron.cli import main
from exprl_megatron.commands import doctor
from exprl_megatron.commands.doctor import ESSENTIAL_ON_GPUS, Finding, examine, lacking, print_findings


@pytest.fixture(autouse=True, scope="module")
def programs_are_tried_once():
    """Which takes a second and a half."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("sandbox_available", "recursion_depth"):
            patch.setattr(doctor, name, functools.cache(getattr(doctor, name)))
        yield


def test_every_missing_part_says_what_it_prevents():
    findings = examine()
    wanted = {"Python", "torch", "megatron-core", "sglang", "fla-core", "GPUs", "sandbox for programs", "ports", "disk"}
    assert wanted <= {finding.part for finding in findings}
    assert all(finding.ok or finding.prevents for finding in findings)


def test_what_is_essential_depends_on_whether_the_machine_is_to_have_gpus():
    found = [Finding("sglang", True, "0.5.23"), Finding("GPUs", False, "none"), Finding("apex", False, "not installed")]
    assert lacking(found, gpus=False) == []
    assert lacking(found, gpus=True) == ["GPUs"]
    assert lacking([Finding("torch", False, "not installed", "everything")], gpus=False) == ["torch"]
    assert set(ESSENTIAL_ON_GPUS) <= {finding.part for finding in examine()}


def test_the_exit_status_tells_a_health_check(monkeypatch, capsys):
    monkeypatch.setattr(
        "exprl_megatron.commands.doctor.examine", lambda: [Finding("torch", False, "not installed", "all")]
    )
    monkeypatch.setattr("sys.argv", ["exprl", "doctor"])
    with pytest.raises(SystemExit, match="1"):
        main()
    assert capsys.readouterr().err == "exprl: torch missing; the table says what for.\n"


def test_json_output_is_for_machines(capsys):
    print_findings(examine(), as_json=True)
    findings = {f["part"]: f for f in json.loads(capsys.readouterr().out)["findings"]}
    assert findings["megatron-core"] == {"part": "megatron-core", "ok": True, "found": "0.19.2", "prevents": ""}
    assert findings["sglang"]["found"] == "0.5.23"


def test_a_gpu_that_this_environment_cannot_use_is_reported(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("exprl_megatron.utils.accelerator.GPU_PACKAGES", {"json": "a", "no_such_module": "b"})
    row = next(finding for finding in examine() if finding.part == "accelerator")
    assert (row.ok, row.found, row.prevents) == (False, "CPU, as this environment has not b", "use of GPUs")
    assert lacking([row], gpus=True)[-1:] == ["accelerator"] and lacking([row], gpus=False) == []


def test_the_variables_of_both_sides_are_shown_and_whose_they_are(monkeypatch):
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    monkeypatch.delenv("NCCL_CUMEM_ENABLE", raising=False)
    found = {finding.part: finding.found for finding in examine()}
    assert found["NCCL, trainer and servers"] == "NCCL_CUMEM_ENABLE=0, NCCL_NVLS_ENABLE=1 (yours)"
    assert "CUDA_DEVICE_MAX_CONNECTIONS=1" in found["CUDA, trainer"]


@pytest.fixture
def infiniband(monkeypatch, tmp_path):
    """`infiniband(library, drivers, adapters)`: what a node has of it; returns its two rows."""

    def found(library: bool, drivers: bool, adapters: int):
        monkeypatch.setattr(doctor, "VERBS", "libc.so.6" if library else "libnone.so.1")
        for name in ("PROVIDERS", "RDMA_DEVICES"):
            monkeypatch.setattr(doctor, name, str(tmp_path))
        for file in ["mlx5.driver"] * drivers + ["rdma_cm", *(f"uverbs{i}" for i in range(adapters))]:
            (tmp_path / file).touch()
        rows = {finding.part: finding for finding in examine()}
        return rows["InfiniBand library"], rows["InfiniBand adapters"]

    return found


@pytest.mark.parametrize(
    ("library", "drivers", "adapters", "ok"),
    [
        (True, True, 2, (True, True)),
        (True, True, 0, (True, False)),
        (True, False, 1, (False, True)),
        (False, True, 1, (False, True)),
    ],
)
def test_what_is_missing_for_rdma_is_reported_with_what_nccl_does_then(infiniband, library, drivers, adapters, ok):
    rows = infiniband(library, drivers, adapters)
    assert tuple(row.ok for row in rows) == ok
    assert all(("NCCL takes TCP" in row.prevents) is not row.ok for row in rows)


def test_a_node_that_is_alone_needs_no_infiniband(infiniband):
    rows = infiniband(False, False, 0)
    assert not set(lacking(list(rows), gpus=True)) & {row.part for row in rows}
