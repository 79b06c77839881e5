"""`exprl judgement` as it is typed."""

import json
from functools import partial

import pytest
import yaml

from exprl_megatron.judging.judgement import Abstained, Scored
from exprl_megatron.judging.store import JudgementStore

JUDGED, REFUSED, RUBRIC = "a1" * 32, "a1" * 8 + "b2" * 24, "c3" * 32
ASKED = {
    "problem": "p7",
    "unit": "prefix",
    "rubric": {"checkpoints": [{"claim": "x is 3", "weight": 1}]},
    "messages": [{"role": "system", "content": "Be strict."}, {"role": "user", "content": "[bold]A trace[/bold]"}],
    "model": "j",
    "temperature": 0.0,
}


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "run" / "judgements.sqlite"
    with JudgementStore(file) as store:
        store.add_judgement(JUDGED, ASKED, "\x1b[2JReasoning: fine.\n\nScore: 4 \ud83d", Scored(0.75, "Score: 4"))
        store.add_judgement(REFUSED, {"problem": "p8"}, "I cannot.", Abstained("refused", "I cannot."))
        store.add_rubric(RUBRIC, {"problem": "p7"}, "Here: []", '{"checkpoints": []}')
    return file


@pytest.fixture
def exprl(command_line):
    return partial(command_line, "judgement")


def test_a_judgement_is_shown_with_all_that_was_asked_and_answered(exprl, file):
    status, printed, _ = exprl(JUDGED[:20], "--store", file)
    assert status == 0
    for shown in (JUDGED, "p7", "prefix", "x is 3", "Be strict.", "Reasoning: fine.", "Score: 4", "scored 0.75"):
        assert shown in printed
    assert "[bold]A trace[/bold]" in printed


def test_what_a_model_wrote_gives_no_commands_to_the_terminal(exprl, file):
    _, printed, _ = exprl(JUDGED[:20], "--store", file)
    assert "\x1b[2J" not in printed
    assert "␛[2J" in printed


def test_an_abstention_is_shown_with_its_reason(exprl, file):
    _, printed, _ = exprl(REFUSED, "--store", file)
    assert "abstained: refused" in printed


def test_json_holds_the_same(exprl, file):
    record = json.loads(exprl(JUDGED[:20], "--store", file, "--json")[1])
    assert record["asked"] == ASKED
    assert record["judgement"] == {"kind": "Scored", "value": 0.75, "evidence": "Score: 4"}
    assert record["answer"].endswith("Score: 4 \ud83d")
    assert (record["hash"], record["kind"]) == (JUDGED, "judgement")
    assert json.loads(exprl(RUBRIC, "--store", file, "--json")[1])["rubric"] == {"checkpoints": []}


def test_without_a_hash_the_latest_are_listed(exprl, file):
    _, printed, _ = exprl("--store", file)
    rows = [line for line in printed.splitlines() if "judgement" in line or "rubric" in line]
    assert ["c3c3c3c3c3c3" in rows[0], "refused" in rows[1], "0.75" in rows[2], len(rows)] == [True, True, True, 3]
    entries = json.loads(exprl("--store", file, "--json")[1])["entries"]
    assert [entry["hash"] for entry in entries] == [RUBRIC, REFUSED, JUDGED]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_runs_store_is_found(exprl, file, tmp_path, elsewhere):
    run = file.parent
    if elsewhere:
        file = file.rename(tmp_path / "shared.sqlite")
    stage = {"kind": "exprl-outcome", "name": "prime", "steps": 1, "problems": {"source": "x.jsonl"}}
    judge = {"model": "j", "store": str(file) if elsewhere else None}
    policy = {"model": "m", "max_tokens": 20000}
    tree = {"directory": str(run), "policy": policy, "judge": judge, "stages": [stage]}
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    status, printed, told = exprl(JUDGED[:20], "--run", run)
    assert (status, told) == (0, "")
    assert "scored 0.75" in printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["a1a1a1"], "Exactly one judgement store is shown; give either --run DIR or --store FILE."),
        (["a1a1a1", "--store", "nowhere.sqlite"], "There is no judgement store nowhere.sqlite"),
        (["a1a1a1", "--run", "nowhere"], "There is no run in nowhere"),
        (["a1a1a1", "--store", "FILE"], "begin with a1a1a1: a1a1a1a1a1a1a1a1, a1a1a1a1a1a1a1a1; give more digits."),
        (["d4d4d4", "--store", "FILE"], "give another hash, the newest ones are c3c3c3c3c3c3c3c3, a1a1a1"),
        (["a1", "--store", "FILE"], "'a1' is not a hash"),
    ],
)
def test_what_cannot_be_shown_is_one_sentence(exprl, file, arguments, sentence):
    status, _, told = exprl(*(str(file) if argument == "FILE" else argument for argument in arguments))
    assert status == 2
    assert told.count("\n") == 1
    assert sentence in told


def test_looking_makes_no_store(exprl, tmp_path):
    exprl("a1a1a1", "--store", tmp_path / "new.sqlite")
    assert not any(tmp_path.iterdir())
