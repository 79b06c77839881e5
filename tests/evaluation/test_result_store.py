"""Results on disk: found again, whole or not at all, and never mixed with those of another evaluation."""

import gzip
import json
import os
import stat

import pytest

from exprl_megatron.errors import UserError
from exprl_megatron.evaluation.eval_config import EvalConfig
from exprl_megatron.evaluation.result_store import ResultStore, question_key
from exprl_megatron.evaluation.sample_counts import SampleCounts
from exprl_megatron.judging.judgement import Abstained, Scored
from exprl_megatron.rollout.group import GradedTrace
from exprl_megatron.rollout.trace import Trace

SETTINGS = EvalConfig(model="m", problems={"source": "p.jsonl"}, directory="d")
KEY = question_key([1, 2], "math", "2")


def samples(problem_id: str) -> list[GradedTrace]:
    verdicts = [Scored(1.0, "2"), Scored(0.0, "no answer"), Abstained("verifier-timeout", "3")]
    return [
        GradedTrace(Trace(problem_id, k, (1, 2), (5,) * (k + 1), (-0.5,) * (k + 1), f"ä{k}\u2028", reason, ()), verdict)
        for k, (verdict, reason) in enumerate(zip(verdicts, ("stop", "length", "stop"), strict=True))
    ]


@pytest.fixture
def directory(tmp_path):
    """`directory(**changes)`: the kept results of an evaluation whose identity has these changes."""
    opened = []

    def open_(**changes) -> ResultStore:
        while opened:
            opened.pop().release()
        settings = SETTINGS.model_copy(update=changes)
        opened.append(ResultStore(tmp_path / "out", settings.identity("hash of the weights")))
        return opened[-1]

    yield open_
    for kept in opened:
        kept.release()


def test_a_finished_problem_is_found_again_with_its_counts_and_samples(directory):
    odd = "a/b c\n../ä"
    kept = directory().save(odd, KEY, samples(odd))
    again = directory()
    assert again.find(odd, KEY) == kept
    assert kept.counts == SampleCounts(2, 1, {"verifier-timeout": 1})
    assert (kept.overlong, kept.tokens) == (1, 6)
    assert again.find("another", KEY) is None
    lines = [json.loads(line) for line in gzip.decompress(again.traces(odd).read_bytes()).decode().split("\n") if line]
    assert [sample["text"] for sample in lines] == ["ä0\u2028", "ä1\u2028", "ä2\u2028"]
    assert lines[2]["judgement"] == {"kind": "Abstained", "reason": "verifier-timeout", "evidence": "3"}


def test_samples_without_counts_are_not_a_finished_problem(directory, tmp_path):
    directory().save("p", KEY, samples("p"))
    (result,) = (tmp_path / "out" / "results").iterdir()
    result.rename(result.with_name(result.name + ".tmp"))
    assert directory().find("p", KEY) is None


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"sampling": SETTINGS.sampling.model_copy(update={"temperature": 1.0})}, "sampling"),
        ({"samples": 64, "seed": 1}, "samples and another seed"),
        ({"prompt": SETTINGS.prompt.model_copy(update={"system": "be brief"})}, "prompt"),
        ({"dtype": "float32"}, "dtype"),
    ],
)
def test_a_directory_of_another_evaluation_is_refused(directory, changes, what):
    directory()
    with pytest.raises(UserError, match=f"has an evaluation with another {what}; use the same"):
        directory(**changes)
    directory()


def test_other_weights_are_another_evaluation(directory, tmp_path):
    directory().release()
    with pytest.raises(UserError, match="an evaluation with another model"):
        ResultStore(tmp_path / "out", SETTINGS.identity("hash of other weights"))


def test_servers_and_deadlines_may_change(directory):
    directory()
    directory(concurrency=7, verifier_deadline_s=1.0, server=SETTINGS.server.model_copy(update={"count": 3}), k=(1,))


def test_another_problem_under_the_same_id_is_refused(directory):
    kept = directory()
    kept.save("p", KEY, samples("p"))
    with pytest.raises(UserError, match="The problem p has changed since"):
        kept.find("p", question_key([1, 2], "math", "3"))


def test_a_damaged_result_is_named(directory, tmp_path):
    kept = directory()
    kept.save("p", KEY, samples("p"))
    (result,) = (tmp_path / "out" / "results").iterdir()
    result.write_text("{}")
    with pytest.raises(UserError, match=r"is damaged .* delete it to measure it again"):
        kept.find("p", KEY)


def test_a_directory_in_use_or_of_other_files_is_refused(directory, tmp_path):
    kept = directory()
    with pytest.raises(UserError, match="Another process is running in"):
        ResultStore(tmp_path / "out", SETTINGS.identity("hash of the weights"))
    kept.release()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files; choose a new or empty directory with --out"):
        ResultStore(tmp_path / "other", SETTINGS.identity("hash of the weights"))


@pytest.fixture
def everybody_s_umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_an_evaluation_s_directory_and_all_in_it_is_its_owners_alone(tmp_path, directory, everybody_s_umask):
    (tmp_path / "out" / "logs").mkdir(parents=True)
    (tmp_path / "out" / "evaluation.json").write_text(json.dumps(SETTINGS.identity("hash of the weights")))
    kept = directory()
    kept.save("p", KEY, samples("p"))
    paths = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert len(paths) >= 6
    modes = {path.relative_to(tmp_path): stat.S_IMODE(path.stat().st_mode) for path in paths}
    assert modes == {path.relative_to(tmp_path): 0o700 if path.is_dir() else 0o600 for path in paths}


def test_a_directory_of_other_files_is_refused_before_its_rights_are_changed(tmp_path, everybody_s_umask):
    (tmp_path / "mine").mkdir(mode=0o755)
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(UserError, match="holds other files"):
        ResultStore(tmp_path / "mine", SETTINGS.identity("hash of the weights"))
    assert stat.S_IMODE((tmp_path / "mine").stat().st_mode) == 0o755
