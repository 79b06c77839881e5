"""Starting, watching and ending servers: ports, bad input, failures, and no orphans."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from helpers.processes import left_behind
from helpers.tiny_models import write_tiny_model, write_tiny_vision_model

from exprl_megatron import planning
from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.errors import ServerError, UserError
from exprl_megatron.serving.keys import KEY_FILE
from exprl_megatron.serving.server_command import irreproducible_sampling, server_command, server_environment
from exprl_megatron.serving.server_process import launch_servers, server_seed, start_servers, stop_servers
from exprl_megatron.serving.server_spec import ServerSpec, server_specs, side_by_side
from exprl_megatron.utils.ports import free_ports, is_free

ARCHITECTURES = Path(planning.__file__).parent / "architectures"
# A program that starts one server from a model and a log directory and then waits to be killed.
LAUNCHER = """
import sys, time
from pathlib import Path
from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.serving.server_process import launch_servers, wait_servers
from exprl_megatron.serving.server_spec import ServerSpec
servers = launch_servers([ServerSpec("policy-0", Path(sys.argv[1]), ServerConfig(), Path(sys.argv[2]))])
print("launched", flush=True)
wait_servers(servers)
print("ready", flush=True)
time.sleep(600)
"""


def living(family, mark):
    """Those of `family` that still run, and any process that inherited the environment variable `mark`.

    The mark finds what was started after `family` was taken; SGLang's processes lose it with their new titles.
    """
    found = set()
    for process in {*family, *psutil.process_iter()}:
        try:
            alive = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
            if alive and (process in family or mark in process.environ()):
                found.add(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def within(seconds, condition):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["launched", "importing", "ready"])
def test_kill_9_of_the_launcher_leaves_no_orphan(tiny_model, tmp_path, moment):
    mark = f"EXPRL_TEST_{uuid.uuid4().hex}"
    command = [sys.executable, "-c", LAUNCHER, str(tiny_model("qwen3")), str(tmp_path)]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, mark: "1"})
    children = partial(psutil.Process(launcher.pid).children, recursive=True)
    family = []
    try:
        assert launcher.stdout.readline() == "launched\n"
        if moment == "importing":
            # Supervisor, server, and the server's own children, which import for seconds before they watch it.
            assert within(300, lambda: len(children()) >= 4)
        if moment == "ready":
            assert launcher.stdout.readline() == "ready\n"
            assert len(children()) >= 4
        family = children()
        launcher.kill()
        launcher.wait()
        assert within(60, lambda: not living(family, mark)), [process.cmdline() for process in living(family, mark)]
    finally:
        launcher.kill()
        for process in living(family, mark):
            process.kill()
        launcher.wait()


@pytest.mark.slow
def test_a_server_that_dies_while_starting_is_an_error_with_its_last_words(tiny_model, tmp_path):
    config = ServerConfig(extra_args=("--no-such-flag",))
    with pytest.raises(ServerError, match=r"(?s)judge-0 .*ended with status .*judge-0.log; its last.*no-such-flag"):
        start_servers([ServerSpec("judge-0", tiny_model("qwen3"), config, tmp_path)])


@pytest.mark.slow
def test_a_start_past_its_deadline_is_an_error_and_stops_all(tiny_model, tmp_path):
    specs = [
        ServerSpec("policy-0", tiny_model("qwen3"), ServerConfig(), tmp_path),
        ServerSpec("judge-0", tiny_model("qwen3"), ServerConfig(start_deadline_s=1), tmp_path),
    ]
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with pytest.raises(ServerError, match=r"judge-0 .*within start_deadline_s \(1 s\)"):
        start_servers(specs)
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before


def test_a_port_in_use_is_named_before_anything_starts(tiny_model, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        specs = server_specs("judge", tiny_model("qwen3"), ServerConfig(port=port), tmp_path / "logs")
        with pytest.raises(UserError, match=f"Port {port}, configured for judge-0, is in use; set another port"):
            launch_servers(specs)
    assert not (tmp_path / "logs").exists()


def test_a_port_wanted_twice_is_refused(tiny_model, tmp_path):
    (port,) = free_ports(1)
    specs = [
        *server_specs("policy", tiny_model("qwen3"), ServerConfig(port=port, count=2), tmp_path),
        *server_specs("judge", tiny_model("qwen3"), ServerConfig(port=port + 1), tmp_path),
    ]
    with pytest.raises(UserError, match=f"Port {port + 1} is set for policy-1 and for judge-0"):
        launch_servers(specs)


@pytest.mark.parametrize(("files", "message"), [((), "no config.json"), (("config.json",), r"no \*.safetensors")])
def test_a_directory_without_a_model_is_refused(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=f"{tmp_path}, the model of policy-0, has {message}"):
        launch_servers(server_specs("policy", tmp_path, ServerConfig(), tmp_path))


def test_float32_is_not_served_on_cuda_unless_attention_kernels_are_named(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("exprl_megatron.serving.server_spec.uses_cuda", lambda: True)
    spec = ServerSpec("judge-0", tiny_model("qwen3"), ServerConfig(), tmp_path / "logs")
    with pytest.raises(UserError, match=r"judge-0 would serve float32, .* choose bfloat16"):
        launch_servers([spec])
    assert not (tmp_path / "logs").exists()
    replace(spec, dtype="bfloat16").check()
    replace(spec, config=ServerConfig(extra_args=("--attention-backend", "triton"))).check()


def test_free_ports_are_different_and_free():
    ports = free_ports(50, taken=set(range(20_000, 31_000)))
    assert len(set(ports)) == 50 and min(ports) >= 31_000
    assert all(is_free(port) for port in ports)


def test_flags_for_a_cpu_are_absent_on_cuda():
    settings = {"dtype": "bfloat16", "port": 1, "seed": 0, "weight_version": "v0"}
    config = ServerConfig(tp=2, max_running_requests=64, extra_args=("--chunked-prefill-size", "512"))
    on_cpu = server_command(Path("m"), config, cuda=False, **settings)
    on_cuda = server_command(Path("m"), config, cuda=True, **settings)
    assert on_cpu[on_cpu.index("--max-total-tokens") + 1] == "65536"
    assert {"--device", "torch_native", "--enable-deterministic-inference", "--max-total-tokens"}.isdisjoint(on_cuda)
    for command in (on_cpu, on_cuda):
        assert command[-2:] == ["--chunked-prefill-size", "512"]
        assert command[command.index("--tp-size") + 1] == "2"
        assert command[command.index("--max-running-requests") + 1] == "64"


@pytest.mark.parametrize(("name", "apart"), [("Glm4MoeForCausalLM", True), ("Qwen3MoeForCausalLM", False)])
def test_a_shared_expert_stays_apart_on_cuda(tmp_path, name, apart):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [name]}))
    settings = {"dtype": "bfloat16", "port": 1, "seed": 0, "weight_version": "v0"}
    flag = "--disable-shared-experts-fusion"
    assert (flag in server_command(tmp_path, ServerConfig(), cuda=True, **settings)) is apart
    # SGLang does not fuse it on a CPU.
    assert flag not in server_command(tmp_path, ServerConfig(), cuda=False, **settings)


@pytest.mark.parametrize("family", ["qwen3.5", "qwen3.5-moe"])
@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("cuda", [True, False])
def test_a_server_of_qwen3_5_reads_the_settings_that_sglang_looks_for_elsewhere(tmp_path, cuda, published, family):
    """transformers 5 does not write `full_attention_interval`; SGLang takes the rotary share from the top level."""
    write_tiny_model(tmp_path, family, layers=4, full_attention_interval=4, published_form=published)
    tree = json.loads((tmp_path / "config.json").read_text())
    tree["rope_parameters"]["partial_rotary_factor"] = tree["partial_rotary_factor"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(tree))
    settings = {"dtype": "bfloat16", "port": 1, "seed": 0, "weight_version": "v0", "cuda": cuda}
    command = server_command(tmp_path, ServerConfig(extra_args=("--max-mamba-cache-size", "7")), **settings)
    read = json.loads(command[command.index("--json-model-override-args") + 1])
    assert (read["full_attention_interval"], read["partial_rotary_factor"]) == (4, 0.5)
    assert read["rope_parameters"] == {
        "rope_type": "default", "rope_theta": 10_000.0, "mrope_interleaved": True, "mrope_section": [2, 1, 1]
    }  # fmt: skip
    assert command.count("--max-mamba-cache-size") == (1 if cuda else 2) and command[-1] == "7"
    assert ("SGLANG_MAMBA_CONV_DTYPE" in server_environment({}, cuda=cuda)) is not cuda
    assert "language_model_only" not in read


@pytest.mark.parametrize("family", ["qwen3.5", "qwen3.5-moe"])
def test_a_server_of_a_vision_model_has_its_language_model_alone(tiny_model, tmp_path, family):
    model = write_tiny_vision_model(tmp_path / "vision", tiny_model(family))
    settings = {"dtype": "bfloat16", "port": 1, "seed": 0, "weight_version": "v0", "cuda": True}
    command = server_command(model, ServerConfig(), **settings)
    read = json.loads(command[command.index("--json-model-override-args") + 1])
    assert read["language_model_only"] is True and read["text_config"]["full_attention_interval"] == 2


def test_states_of_gated_delta_nets_have_bounded_memory_on_a_cpu(tmp_path):
    """27B has 48 such layers of 48 heads of 128 x 128 numbers: 151 MB of fp32 a request, and the convolutions."""
    settings = {"dtype": "bfloat16", "port": 1, "seed": 0, "weight_version": "v0", "cuda": False}
    counts = {}
    for model in (ARCHITECTURES / "qwen3.5-27b", write_tiny_model(tmp_path / "tiny", "qwen3.5")):
        command = server_command(model, ServerConfig(), **settings)
        counts[model.name] = int(command[command.index("--max-mamba-cache-size") + 1])
    assert counts == {"qwen3.5-27b": 2**31 // (48 * (48 * 128 * 128 * 4 + 3 * 10_240 * 2)), "tiny": 1536}


def test_servers_on_one_machine_have_gpus_of_their_own(tmp_path):
    specs = server_specs("policy", tmp_path, ServerConfig(count=3, tp=2), tmp_path)
    assert [spec.first_gpu for spec in specs] == [0, 2, 4]
    placed = side_by_side(specs, first_gpu=1)
    assert [spec.first_gpu for spec in placed] == [1, 3, 5]
    settings = {"dtype": "bfloat16", "port": 1, "seed": 0, "weight_version": "v0", "first_gpu": placed[1].first_gpu}
    command = server_command(tmp_path, specs[1].config, cuda=True, **settings)
    assert command[command.index("--base-gpu-id") + 1] == "3"
    assert "--base-gpu-id" not in server_command(tmp_path, specs[1].config, cuda=False, **settings)


@pytest.fixture
def started(monkeypatch):
    """The commands and environments that servers would be started with; nothing is started."""
    processes = []

    def popen(command, *, env, **_):
        processes.append((command, env))
        return SimpleNamespace(pid=1, poll=lambda: None)

    monkeypatch.setattr("exprl_megatron.processes.starter.subprocess.Popen", popen)
    return processes


def test_servers_draw_from_different_seeds_and_from_new_ones_after_each_start(tiny_model, tmp_path, started):
    config = ServerConfig(count=2)
    specs = [spec for role in ("policy", "judge") for spec in server_specs(role, tiny_model("qwen3"), config, tmp_path)]
    servers = [server for _ in range(3) for server in launch_servers(specs)]
    seeds = [int(command[command.index("--random-seed") + 1]) for command, _ in started]
    assert len(seeds) == 12 and len(set(seeds)) == 12
    assert all(0 <= seed < 2**31 for seed in seeds)
    # The instance_id that a supervisor registers is the one that was seeded.
    assert seeds == [server_seed(0, server.name, server.instance_id) for server in servers]


def test_each_server_has_the_port_and_the_key_of_its_own_spec(tiny_model, tmp_path, started):
    config, ports = ServerConfig(), free_ports(2)
    specs = [
        ServerSpec(f"policy-{i}", tiny_model("qwen3"), config, tmp_path, port=port) for i, port in enumerate(ports)
    ]
    specs[1] = replace(specs[1], key_file=tmp_path / "other-key")
    servers = launch_servers(specs)
    assert [server.url.rpartition(":")[2] for server in servers] == [str(port) for port in ports]
    assert [command[command.index("--port") + 1] for command, _ in started] == [str(port) for port in ports]
    assert [server.key_file for server in servers] == [tmp_path / "key", tmp_path / "other-key"]
    assert [env[KEY_FILE] for _, env in started] == [str(server.key_file) for server in servers]
    assert (tmp_path / "other-key").is_file()


def test_a_started_server_has_the_nccl_variables_of_its_own_size_and_arguments(tiny_model, tmp_path, started):
    deterministic = ("--enable-deterministic-inference",)
    for tp, extra_args in ((2, deterministic), (2, ()), (1, deterministic)):
        launch_servers(
            [ServerSpec("policy-0", tiny_model("qwen3"), ServerConfig(tp=tp, extra_args=extra_args), tmp_path)]
        )
    environments = [env for _, env in started]
    # SGLang itself sets NCCL_ALGO for deterministic inference of several ranks; the trainer's ranks need the same.
    assert ["NCCL_ALGO" in env for env in environments] == [True, False, False]
    assert all(env["NCCL_CUMEM_ENABLE"] == env["NCCL_NVLS_ENABLE"] == "0" for env in environments)


def test_gloo_of_a_server_for_this_machine_alone_listens_on_loopback(tiny_model, tmp_path, started, monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    model, config = tiny_model("qwen3"), ServerConfig()
    launch_servers([ServerSpec("policy-0", model, config, tmp_path)])
    launch_servers([ServerSpec("policy-1", model, config, tmp_path, host="127.0.0.1")])
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    launch_servers([ServerSpec("policy-2", model, config, tmp_path)])
    assert [env.get("GLOO_SOCKET_IFNAME") for _, env in started] == ["lo", None, "eth7"]


def test_the_seed_of_a_server_depends_on_all_that_tells_it_from_another_start():
    seeds = {server_seed(run, name, start) for run in (0, 1) for name in ("policy-0", "policy-1") for start in "ab"}
    assert len(seeds) == 8
    assert server_seed(0, "policy-0", "a") == server_seed(0, "policy-0", "a")


@pytest.mark.parametrize(
    ("cuda", "extra_args", "reproducible"),
    [
        (True, (), False),
        (True, ("--enable-deterministic-inference",), True),
        (True, ("--rl-on-policy-target", "fsdp"), True),
        (False, (), True),
    ],
)
def test_sampling_that_ignores_the_seeds_of_requests_is_reported(cuda, extra_args, reproducible):
    sentence = irreproducible_sampling(ServerConfig(extra_args=extra_args), cuda)
    assert (sentence is None) is reproducible
    assert reproducible or "--enable-deterministic-inference" in sentence


def test_a_server_does_not_inherit_the_rank_of_its_trainer_or_the_cpu_backend_on_cuda():
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "x"}
    inherited = {**rank, "PATH": "/bin", "PYTHONPATH": "/mine"}
    on_cuda = server_environment(inherited, cuda=True)
    assert {name for name in on_cuda if not name.startswith("NCCL_")} == {
        "PATH",
        "PYTHONPATH",
        "HF_HUB_OFFLINE",
        "PYTHONUNBUFFERED",
        "SGLANG_EXTERNAL_MODEL_PACKAGE",
    }
    plugins, mine = on_cuda["PYTHONPATH"].split(os.pathsep)
    assert mine == "/mine" and (Path(plugins) / "exprl_private_stores.py").is_file()
    on_cpu = server_environment(inherited, cuda=False)
    plugins_too, cpu_backend, mine = on_cpu["PYTHONPATH"].split(os.pathsep)
    assert plugins_too == plugins
    assert mine == "/mine" and (Path(cpu_backend) / "sgl_kernel").is_dir()
    assert not rank.keys() & on_cpu.keys()


def test_a_server_on_cuda_finds_the_models_that_sglang_has_no_class_for_unless_the_user_names_others():
    on_cuda = server_environment({}, cuda=True)
    package = Path(on_cuda["PYTHONPATH"].split(os.pathsep)[0]) / on_cuda["SGLANG_EXTERNAL_MODEL_PACKAGE"]
    assert (package / "seed_oss.py").is_file()
    named = {"SGLANG_EXTERNAL_MODEL_PACKAGE": "mine"}
    assert server_environment(named, cuda=True)["SGLANG_EXTERNAL_MODEL_PACKAGE"] == "mine"


def test_a_server_on_a_cpu_has_the_threads_of_its_config_whatever_its_trainer_has():
    inherited = {"OMP_NUM_THREADS": "7"}
    assert server_environment(inherited, cuda=False)["OMP_NUM_THREADS"] == "1"
    assert server_environment(inherited, cuda=False, cpu_threads=2)["OMP_NUM_THREADS"] == "2"
    assert server_environment(inherited, cuda=True, cpu_threads=2)["OMP_NUM_THREADS"] == "7"


def test_a_server_is_started_with_the_threads_of_its_config(tiny_model, tmp_path, monkeypatch):
    environments = []

    def start(command, *, env, **_):
        environments.append(env)
        raise OSError("not started")

    monkeypatch.setattr(subprocess, "Popen", start)
    spec = ServerSpec("policy-0", tiny_model("qwen3"), ServerConfig(cpu_threads=3), tmp_path)
    with pytest.raises(OSError, match="not started"):
        launch_servers([spec])
    assert [environment["OMP_NUM_THREADS"] for environment in environments] == ["3"]


@pytest.mark.slow
def test_stopping_ends_a_server_that_does_not_answer(tiny_model, tmp_path):
    (server,) = launch_servers([ServerSpec("policy-0", tiny_model("qwen3"), ServerConfig(), tmp_path)])
    (child,) = _eventually_one_child(server.pid)
    os.killpg(child.pid, signal.SIGSTOP)
    stop_servers([server])
    assert not server.alive() and not left_behind([child])


def _eventually_one_child(pid):
    assert within(60, lambda: len(psutil.Process(pid).children()) == 1)
    return psutil.Process(pid).children()
