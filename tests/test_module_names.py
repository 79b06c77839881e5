"""Where tests are and what they import: by module name from pytest's paths, and never from a path that they add."""

from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parent
NOT_A_PACKAGE = {
    "helpers": "shared by tests of several directories",
    "data": "files that tests read",
    "gpu": "needs GPUs",
    "on_device": "the same work on a CPU and on GPUs",
    "nccl_backend": "the test backend with NCCL's behavior",
    "slurm": "needs a Slurm",
    "te": "needs Transformer Engine",
}


def test_no_two_test_modules_have_the_same_name():
    """Pytest imports them by it."""
    names = Counter(path.name for path in TESTS.rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_a_directory_of_tests_has_the_name_of_the_package_that_it_tests():
    root = TESTS.parent
    packages = {path.name for path in (root / "exprl_megatron").iterdir() if path.is_dir()} | {"recipes", "tools"}
    directories = {path.name for path in TESTS.iterdir() if list(path.glob("*.py"))}
    assert directories - packages - NOT_A_PACKAGE.keys() == set()
    assert "launch" in directories & packages


def test_no_test_adds_to_the_path_of_modules():
    added = ("sys.path.insert", "sys.path.append", "sys.path.extend", "sys.path +=")
    files = [path for path in TESTS.rglob("*.py") if path != Path(__file__)]
    assert len(files) > 300
    assert [str(path) for path in files if any(words in path.read_text() for words in added)] == []
