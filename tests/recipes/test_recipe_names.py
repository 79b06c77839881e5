"""`python -m recipes list` and its help know every recipe without NeMo-Run, and fit the terminal."""

import json
import subprocess
import sys

import pytest

from recipes import entrypoints, logs, names
from recipes.catalog import MODELS


def called(*arguments: str, columns: int = 80) -> tuple[str, list[str]]:
    """What `python -m recipes` prints, and the modules that it imports."""
    code = (
        "import json, sys\nfrom recipes import __main__ as command\nsys.argv[0] = 'recipes'\n"
        "try:\n    command.main()\nexcept SystemExit:\n    pass\n"
        "print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    )
    environment = {"COLUMNS": str(columns), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout, json.loads(done.stderr.splitlines()[-1])


def test_the_names_are_those_of_the_modules_and_of_the_experiments():
    assert [module.NAME for module in MODELS.values()] == list(names.MODELS)
    assert [names.model_summary(name) for name in names.MODELS] == [m.__doc__.splitlines()[0] for m in MODELS.values()]
    single = [function.__name__ for function in entrypoints.SINGLE]
    assert [*single, "exprl_then_sparse_rl"] == list(names.EXPERIMENTS)
    for name in names.EXPERIMENTS:
        assert names.experiment_summary(name) == getattr(entrypoints, name).__doc__.splitlines()[0]


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_the_list_fits_and_does_not_import_nemo_run(columns):
    out, modules = called("list", columns=columns)
    assert all(any(line.startswith(name) for line in out.splitlines()) for name in names.MODELS)
    assert max(map(len, out.splitlines())) <= columns
    assert "the paper's runs in their recommended form" in " ".join(out.split()) or columns < 200
    assert "nemo_run" not in modules and "torch" not in modules


def test_the_help_says_what_each_experiment_is():
    out, modules = called("--help", columns=120)
    assert "[Entrypoint]" not in out and "nemo_run" not in modules
    for name in names.EXPERIMENTS:
        assert name in out
    assert names.experiment_summary("exprl") in out


def test_an_unknown_experiment_is_refused_with_those_that_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "get_nemorun_home", lambda: str(tmp_path))
    assert logs._unknown("nope") == (
        f"There is no experiment nope in {tmp_path}/experiments, which has none; see NEMORUN_HOME."
    )
    for number in range(7):
        (tmp_path / "experiments" / "prime" / f"prime_{number}").mkdir(parents=True)
    assert logs._unknown("prme").endswith("experiments; did you mean prime?")
    assert logs._unknown("xyz").endswith(", and 2 earlier ones.") and "there are prime_" in logs._unknown("xyz")
