"""What an installed copy of the project carries: one version, and the marker that its types may be relied on."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import exprl_megatron

ROOT = Path(__file__).parents[1]
_DESCRIBE = """
import json
from distutils.core import run_setup
import setuptools
package = run_setup("setup.py", stop_after="init")
build = package.get_command_obj("build_py")
build.ensure_finalized()
files = [f"{name}/{file}" for _, name, _, files in build.data_files for file in files]
print(json.dumps({"version": package.get_version(), "files": files}))
"""


@pytest.fixture(scope="module")
def described():
    """Version and package data of a wheel that would be built here."""
    done = subprocess.run([sys.executable, "-c", _DESCRIBE], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_a_wheel_carries_the_marker_for_type_checkers(described):
    assert any(re.fullmatch(r".*exprl_megatron/py\.typed", file) for file in described["files"])


def test_the_version_is_written_in_one_place(described):
    assert described["version"] == exprl_megatron.__version__
    assert exprl_megatron.__version__ not in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_the_changelog_has_a_section_for_this_version_and_one_for_what_follows():
    sections = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert sections[0] == "Unreleased"
    assert exprl_megatron.__version__ in sections[1:]
    assert len(set(sections)) == len(sections)
