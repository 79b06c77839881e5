"""What `python -m recipes` refuses is one sentence with the names that there are, and no config is printed."""

import sys

import nemo_run as run
import pytest
from nemo_run.cli import cli_parser

from recipes import __main__ as command
from recipes.catalog import EXECUTORS
from recipes.short_errors import EXECUTORS as NAMED


@pytest.fixture
def recipes(monkeypatch, capsys):
    """`recipes(*arguments)`: (status, stdout, stderr); what the command changes in NeMo-Run is put back afterwards."""
    monkeypatch.setattr(run, "dryrun_fn", run.dryrun_fn)
    monkeypatch.setattr(run.cli.RunContext, "cli_execute", run.cli.RunContext.cli_execute)
    monkeypatch.setattr(cli_parser.logger, "disabled", False)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["recipes", "exprl", "--dryrun", "--yes", *arguments])
        with pytest.raises(SystemExit) as ended:
            command.main()
        return ended.value.code, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--factory", "llama3p3_70"], "There is no model llama3p3_70; did you mean llama3p3_70b?"),
        (["--factory", "nn(nodes=2)"], "There is no model nn; there are miniature, smollm2_135m, qwen3_4b, "),
        (["nodes.tainer=2"], "nodes.tainer=2 sets tainer, which there is not; did you mean trainer?"),
        (["site.wrkdir=x"], "site.wrkdir=x sets wrkdir, which there is not; did you mean workdir?"),
        (["nope=3"], "nope=3 sets nope, which there is not; did you mean nodes?"),
        (["config.policy.modle=x"], "config: unknown key policy.modle; did you mean 'model'?"),
        (["config.polcy.x=1"], "config.polcy.x=1 sets polcy, which there is not; did you mean policy?"),
        (["config.policy.layot.tp=2"], "config.policy.layot.tp=2 sets layot, which there is not; did you mean layout?"),
        (["confg.seed=1"], "confg.seed=1 sets confg, which there is not; did you mean config?"),
        (["nods.trainer=1"], "nods.trainer=1 sets nods, which there is not; did you mean nodes?"),
        (["run.executor=slrm"], "There is no executor slrm; did you mean slurm?"),
        (
            ["run.executor=slurm", "run.executor.partion=x"],
            "partion=x sets partion, which there is not; did you mean partition?",
        ),
    ],
)
def test_a_mistake_is_one_sentence_with_the_nearest_name(recipes, arguments, sentence):
    chosen = [] if "--factory" in arguments else ["--factory", "miniature"]
    status, out, err = recipes(*chosen, *arguments)
    assert status == 2
    (line,) = err.splitlines()
    assert line.startswith(f"recipes: {sentence}")
    assert len(out.splitlines()) <= 2, "no config"


def test_the_executors_that_are_named_are_those_of_the_catalog():
    assert tuple(executor.__name__ for executor in EXECUTORS) == NAMED
