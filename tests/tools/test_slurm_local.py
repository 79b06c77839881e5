"""tools/slurm_local.sh says in one sentence what it lacks, and changes nothing then."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "slurm_local.sh"
TOOLS = ("bash", "cat", "dirname", "id", "paste", "realpath", "tail")


@pytest.fixture
def slurm_local():
    """`slurm_local("install", user=65534)`: what it says with nothing but TOOLS on the PATH."""
    with tempfile.TemporaryDirectory() as directory:
        path, home = Path(directory), Path(directory, "home")
        # Other users must find the tools, as one may not under pytest's own directories.
        path.chmod(0o755)
        for tool in TOOLS:
            (path / tool).symlink_to(shutil.which(tool))
        # The directories of Slurm's daemons, which the script adds to the PATH itself, have not srun and its like.
        bare = {"PATH": str(path), "SLURM_LOCAL_HOME": str(home)}

        def run(command: str, user: int | None = None) -> str:
            # On standard input, since another user may not be allowed to read this directory.
            with open(SCRIPT) as script:
                bash = [shutil.which("bash"), "-s", command]
                done = subprocess.run(bash, stdin=script, env=bare, user=user, cwd="/", capture_output=True, text=True)
            assert done.returncode == 1
            assert not home.exists()
            return done.stderr

        yield run


def test_without_root_nothing_is_installed(slurm_local):
    user = 65534 if os.getuid() == 0 else None
    assert slurm_local("install", user=user).startswith("slurm-local: the installation of Slurm's packages needs root")


@pytest.mark.skipif(os.getuid() != 0, reason="only root comes as far as apt-get")
def test_without_apt_get_it_says_whose_packages_it_needs(slurm_local):
    expected = "slurm-local: apt-get was not found; the local Slurm is made of Debian's or Ubuntu's packages.\n"
    assert slurm_local("install") == expected


def test_start_names_what_is_not_installed(slurm_local):
    told = slurm_local("start")
    assert "srun sbatch scontrol" in told
    assert told.endswith("missing; run 'tools/slurm_local.sh install' first.\n")


def test_an_unknown_command_is_answered_with_those_there_are(slurm_local):
    assert slurm_local("begin") == "slurm-local: give one of install, start, stop, env.\n"
