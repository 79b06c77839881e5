"""A Slurm of two nodes on this machine, started once for all tests here and ended after them."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "slurm_local.sh"


@pytest.fixture(scope="session")
def slurm():
    """The running Slurm; this process, and all that it starts, uses it, and `exprl` of this environment."""
    installed = subprocess.run([SCRIPT, "install"], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(installed.stderr.strip())
    from nemo_run.config import get_nemorun_home, set_nemorun_home
    from nemo_run.run.torchx_backend.schedulers import slurm as scheduler

    with tempfile.TemporaryDirectory(prefix="exprl-slurm-") as directory, pytest.MonkeyPatch.context() as patch:
        home = Path(directory, "slurm")
        patch.setenv("SLURM_LOCAL_HOME", str(home))
        patch.setenv("SLURM_LOCAL_PORT", str(three_free_ports()))
        patch.setenv("NEMORUN_HOME", str(Path(directory, "home")))
        nemorun_home = get_nemorun_home()
        set_nemorun_home(os.environ["NEMORUN_HOME"])
        # NeMo-Run settles at import where it lists jobs, by which other processes find them.
        patch.setattr(scheduler, "SLURM_JOB_DIRS", f"{os.environ['NEMORUN_HOME']}/.slurm_jobs")
        try:
            subprocess.run([SCRIPT, "start"], check=True)
            environment = f'eval "$({SCRIPT} env)" && echo "$SLURM_CONF" && echo "$PATH"'
            conf, path = subprocess.run(
                ["bash", "-c", environment], check=True, capture_output=True, text=True
            ).stdout.splitlines()
            patch.setenv("SLURM_CONF", conf)
            # NeMo-Run's shell commands read from it.
            patch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115 - as long as the session
            patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{path}")
            yield
        finally:
            set_nemorun_home(nemorun_home)
            subprocess.run([SCRIPT, "stop"], check=True)
        assert [file.name for file in home.iterdir()] == ["log"]
        assert str(home) not in Path("/etc/hosts").read_text()


def three_free_ports() -> int:
    """The first of three ports in a row that nobody uses."""
    for first in range(16817, 17800, 3):
        try:
            for port in range(first, first + 3):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise RuntimeError("no three ports in a row are free between 16817 and 17800")
