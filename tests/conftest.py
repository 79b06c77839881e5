"""Fixtures shared by all tests: tiny models, and one running server.

What the fixtures need is imported inside them, so that tests without them start at once.
"""

import asyncio
import gc
import importlib.util
import inspect
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

import exprl_megatron.policy  # noqa: F401 - prepares what a test imports of megatron.core, in whichever order
from exprl_megatron.utils.accelerator import environment, missing_gpu_packages


def pytest_configure(config):
    """Without the GPU environment every test, and every process that one starts, runs on the CPU."""
    if missing_gpu_packages():
        os.environ.update(environment(cuda=False))
    _start_times_that_do_not_follow_the_clock()
    _nothing_takes_long()
    # The environment with Transformer Engine has no property tests, and not their library.
    if importlib.util.find_spec("hypothesis"):
        _same_examples_at_any_speed()


def _start_times_that_do_not_follow_the_clock():
    """psutil's Process.children misses some while the system clock is adjusted, from which it takes the boot's time."""
    import psutil

    booted = psutil.boot_time()
    psutil._pslinux.boot_time = lambda: booted


def _nothing_takes_long():
    """On a loaded machine any import may: commands print no line about it into the errors that tests compare."""
    from exprl_megatron.plugins import long_calls

    long_calls.FIRST_S = 3600.0


def _same_examples_at_any_speed():
    """How fast examples are made says nothing on a loaded machine, and the same ones are tried each time."""
    from hypothesis import HealthCheck, settings

    settings.register_profile("tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("tests")


def pytest_report_header(config):
    missing = missing_gpu_packages()
    return f"accelerator: the CPU, as {' and '.join(missing)} are not installed" if missing else "accelerator: any GPU"


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that workers side by side end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("slurm")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """The million objects of libraries and tests stay: they are not looked through for garbage, here or later.

    Whatever leaves a world collects garbage, for half a second of a core if it had to look at them.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def _state_of_the_process_is_given_back():
    """What code under test sets for a process of its own: another test, which may run in this one or not, has not."""
    umask = os.umask(0o077)
    os.umask(umask)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    interval, started = sys.getswitchinterval(), os.environ.get("EXPRL_STARTED")
    yield
    os.umask(umask)
    sys.setswitchinterval(interval)
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:
                # None: not from Python.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
    os.environ.pop("EXPRL_STARTED", None)
    if started is not None:
        os.environ["EXPRL_STARTED"] = started


@pytest.fixture
def command_line(monkeypatch, capsys):
    """`command_line("show", run)`: exit status, output and errors of `exprl show RUN`, run in this process."""
    from exprl_megatron import cli

    def call(command: str, *arguments: object, columns: int = 100) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "argv", ["exprl", command, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return call


@pytest.fixture(autouse=True)
def _no_plugins_of_another_test():
    """Where one test's config searches for modules, the next one's does not."""
    from exprl_megatron.plugins import loading

    kept = list(loading._plugin_directories)
    yield
    loading._plugin_directories[:] = kept


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """`tiny_model("qwen3", tied=True)`: the directory of such a model, written once (see write_tiny_model).

    Tests must not write into it.
    """
    from helpers.tiny_models import write_tiny_model

    written: dict[str, Path] = {}

    def get(architecture: str, **settings) -> Path:
        bound = inspect.signature(write_tiny_model).bind(Path(), architecture, **settings)
        bound.apply_defaults()
        key = "-".join(str(value) for value in list(bound.arguments.values())[1:])
        if key not in written:
            written[key] = write_tiny_model(tmp_path_factory.mktemp(architecture), architecture, **settings)
        return written[key]

    return get


@pytest.fixture(scope="session")
def nccl_records(tmp_path_factory):
    """Where processes under the test backend with NCCL's behavior record what they notice (see under_nccl)."""
    return tmp_path_factory.mktemp("nccl_records")


@pytest.fixture(scope="session")
def qwen3_server(tiny_model, tmp_path_factory, nccl_records):
    """A running policy server with the default tiny Qwen3; a test leaves it with the weights it found.

    It joins groups over gloo, and over the test backend with NCCL's behavior.
    """
    from helpers.forking import starter
    from helpers.under_nccl import knows_backend

    from exprl_megatron.config.serving import ServerConfig
    from exprl_megatron.serving.server_process import start_servers
    from exprl_megatron.serving.server_spec import ServerSpec

    config = ServerConfig(request_deadline_s=120)
    spec = ServerSpec("policy-0", tiny_model("qwen3"), config, tmp_path_factory.mktemp("logs"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in knows_backend(nccl_records).items():
            patch.setenv(name, value)
        (server,) = start_servers([spec], starter())
    with server:
        yield server


@pytest.fixture(scope="module", params=["gloo", "nccl_like"])
def collectives(request, nccl_records):
    """What this process's groups go over. Under the backend with NCCL's behavior nothing may be noticed."""
    if request.param == "gloo":
        yield request.param
        return
    from helpers.under_nccl import faults, uses_backend

    before = faults(nccl_records)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in uses_backend(nccl_records).items():
            patch.setenv(name, value)
        import nccl_like

        nccl_like.register()
        yield request.param
    assert faults(nccl_records) == before


@pytest.fixture(scope="module")
def trained_server(qwen3_server, tiny_model):
    """The same server for tests that send weights to it; it gets its first ones back."""
    yield qwen3_server

    async def restore():
        async with qwen3_server.client() as client:
            # A run may have ended while it held requests.
            await client.reset(deadline_s=60)
            await client.update_from_disk(tiny_model("qwen3"), "initial")

    asyncio.run(restore())
