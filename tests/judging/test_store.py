import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from store_writer import key_of

from exprl_megatron.errors import UserError
from exprl_megatron.judging.content_key import content_key
from exprl_megatron.judging.judgement import Abstained, Scored
from exprl_megatron.judging.store import JudgementStore

WRITER = Path(__file__).parent / "store_writer.py"
KEY = content_key("judgement", trace="a")


@pytest.fixture
def store(tmp_path):
    with JudgementStore(tmp_path / "judgements.sqlite") as opened:
        yield opened


def start_writer(file: Path, first: int, last: int, score: float) -> subprocess.Popen:
    command = [sys.executable, str(WRITER), str(file), str(first), str(last), str(score)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def integrity(file: Path) -> str:
    connection = sqlite3.connect(file)
    try:
        return connection.execute("PRAGMA integrity_check").fetchone()[0]
    finally:
        connection.close()


@pytest.mark.parametrize(
    "judgement",
    [
        Scored(0.1 + 0.2, "Score: 2"),
        Scored(1 / 3, "the whole answer"),
        Scored(5e-324),
        Scored(1.0, ""),
        Abstained("unreadable", "no score"),
        Abstained("too-long"),
        Scored(0.75, "lone surrogate \ud83d, null \x00, quote ' and \u2028 line"),
    ],
)
def test_a_judgement_comes_back_bit_for_bit_even_in_another_process_life(tmp_path, judgement):
    file = tmp_path / "s.sqlite"
    with JudgementStore(file) as store:
        store.keep_judgement(KEY, {"trace": "x"}, "the whole answer", judgement)
    with JudgementStore(file) as store:
        found = store.find_judgement(KEY)
    assert found == judgement
    if isinstance(judgement, Scored):
        assert found.value.hex() == judgement.value.hex()


def test_a_rubric_comes_back_exactly(store):
    rubric = json.dumps({"checkpoints": [{"claim": "x = \\frac{1}{2}", "weight": 0.1}]})
    store.keep_rubric(KEY, {"reference": "r"}, f"Here it is: {rubric}", rubric)
    assert store.find_rubric(KEY) == rubric


def test_what_was_never_kept_is_none(store):
    assert store.find_judgement(KEY) is None
    assert store.find_rubric(KEY) is None


def test_the_first_of_two_judgements_under_one_key_stays(store):
    store.keep_judgement(KEY, {}, "first", Scored(0.25))
    store.keep_judgement(KEY, {}, "second", Scored(0.75))
    store.keep_rubric(KEY, {}, "first", "[1]")
    store.keep_rubric(KEY, {}, "second", "[2]")
    assert store.find_judgement(KEY) == Scored(0.25)
    assert store.find_rubric(KEY) == "[1]"


@pytest.mark.parametrize("reason", ["timeout", "server-error"])
def test_a_failure_of_the_servers_is_not_kept_and_a_later_verdict_is(store, reason):
    store.keep_judgement(KEY, {}, "", Abstained(reason))
    assert store.find_judgement(KEY) is None
    store.keep_judgement(KEY, {}, "Score: 5", Scored(1.0))
    assert store.find_judgement(KEY) == Scored(1.0)


@pytest.mark.parametrize("value", [-0.25, 1.5, float("nan")])
def test_a_score_outside_the_unit_interval_is_a_defect_of_the_caller(store, value):
    with pytest.raises(ValueError, match="a score is in"):
        store.keep_judgement(KEY, {}, "", Scored(value))


def test_a_resumed_run_asks_only_for_what_it_has_not(tmp_path):
    asked = []

    def judgement(store: JudgementStore, number: int):
        found = store.find_judgement(key_of(number))
        if found is None:
            asked.append(number)
            found = Scored(number / 7)
            store.keep_judgement(key_of(number), {"number": number}, "", found)
        return found

    with JudgementStore(tmp_path / "s.sqlite") as store:
        before = [judgement(store, number) for number in range(4)]
    with JudgementStore(tmp_path / "s.sqlite") as store:
        after = [judgement(store, number) for number in range(6)]
    assert asked == [0, 1, 2, 3, 4, 5]
    assert after[:4] == before


def test_writers_at_once_and_one_killed_lose_nothing_that_was_kept(tmp_path):
    file = tmp_path / "s.sqlite"
    victim = start_writer(file, 0, 10_000_000, 0.125)
    others = [start_writer(file, first, first + 800, score) for first, score in ((0, 0.25), (200, 0.5), (0, 0.75))]
    promised = {victim.stdout.readline().strip() for _ in range(300)}
    victim.kill()
    promised |= {line.strip() for line in victim.stdout if line.endswith("\n")}
    victim.wait()
    for process in others:
        promised |= set(process.communicate()[0].split())
        assert process.returncode == 0
    assert integrity(file) == "ok"
    with JudgementStore(file) as store:
        assert {key_of(number) for number in range(1000)} <= promised
        assert all(store.find_judgement(key).value in (0.125, 0.25, 0.5, 0.75) for key in promised)
        store.keep_judgement(KEY, {}, "after the kill", Scored(1.0))
        assert store.find_judgement(KEY) == Scored(1.0)


def test_two_processes_that_keep_the_same_keys_agree_on_the_first(tmp_path):
    file = tmp_path / "s.sqlite"
    for process in [start_writer(file, 0, 300, score) for score in (0.25, 0.75)]:
        assert process.communicate()[0] and process.returncode == 0
    with JudgementStore(file) as store:
        entries = store.newest(1000)
    assert len(entries) == 300
    assert all(entry.answer == f"by {entry.result.value}" for entry in entries)


def test_the_store_is_made_with_its_directory_and_leaves_nothing_else(tmp_path):
    file = tmp_path / "run" / "judgements.sqlite"
    JudgementStore(file).close()
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_file_that_is_not_sqlite_is_refused_and_left_alone(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("something else, of more than one hundred bytes, " * 4)
    with pytest.raises(UserError, match=r"notes\.txt cannot be used \(file is not a database\)"):
        JudgementStore(file)
    assert file.read_text().startswith("something else")


def test_an_sqlite_file_of_another_program_is_refused(tmp_path):
    connection = sqlite3.connect(tmp_path / "other.sqlite")
    connection.execute("CREATE TABLE judgements (key)")
    connection.close()
    with pytest.raises(UserError, match=r"other\.sqlite is no judgement store"):
        JudgementStore(tmp_path / "other.sqlite")


def test_a_store_of_another_version_is_refused(tmp_path):
    file = tmp_path / "s.sqlite"
    JudgementStore(file).close()
    connection = sqlite3.connect(file)
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    with pytest.raises(UserError, match="has version 7, and this program reads the versions 1 and 2"):
        JudgementStore(file)


def test_a_directory_in_the_stores_place_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be opened"):
        JudgementStore(tmp_path)


def test_a_damaged_store_is_named(tmp_path):
    file = tmp_path / "s.sqlite"
    with JudgementStore(file) as store:
        for number in range(200):
            store.keep_judgement(key_of(number), {"text": "x" * 100}, "y" * 400, Scored(0.5))
    content = bytearray(file.read_bytes())
    content[4096 : len(content)] = b"\x5a" * (len(content) - 4096)
    file.write_bytes(content)
    with JudgementStore(file) as store, pytest.raises(UserError, match=r"s\.sqlite cannot be used \(.*malformed"):
        store.find_judgement(key_of(3))


def test_a_row_is_found_by_the_beginning_of_its_hash(store):
    store.keep_judgement("a" * 64, {"trace": "t"}, "Score: 4", Scored(0.75, "Score: 4"))
    store.keep_judgement("a" * 10 + "b" * 54, {}, "", Abstained("refused"))
    store.keep_rubric("c" * 64, {"reference": "r"}, "raw", "{}")
    entry = store.entry("AAAAAAAAAAA")
    assert (entry.key, entry.asked, entry.answer, entry.result) == (
        "a" * 64,
        {"trace": "t"},
        "Score: 4",
        Scored(0.75, "Score: 4"),
    )
    assert store.entry("c" * 64).result == "{}"
    with pytest.raises(UserError, match=f"2 hashes in .* begin with aaaaaa: {'a' * 16}, {'a' * 10}bbbbbb; give more"):
        store.entry("aaaaaa")


def test_an_unknown_hash_is_answered_with_those_that_are_near(store):
    with pytest.raises(UserError, match="those kept last are none, for the store is empty"):
        store.entry("abcdef")
    store.keep_judgement("a" * 64, {}, "", Scored(0.5))
    with pytest.raises(UserError, match=f"those that begin alike are {'a' * 16}"):
        store.entry("a" * 20 + "f")
    with pytest.raises(UserError, match=f"those kept last are {'a' * 16}"):
        store.entry("f" * 8)


@pytest.mark.parametrize("prefix", ["abcde", "", "xyzxyz", "abc%__"])
def test_what_is_no_hash_is_refused(store, prefix):
    with pytest.raises(UserError, match="is no hash; give at least 6"):
        store.entry(prefix)


def test_the_newest_rows_come_first(store):
    for number in range(4):
        store.keep_judgement(key_of(number), {}, "", Scored(0.5))
    assert [entry.key for entry in store.newest(2)] == [key_of(3), key_of(2)]


def test_a_content_key_depends_on_content_alone():
    # echo -n '["judgement",{"model":"m","trace":"t"}]' | sha256sum
    expected = "d3e788bead39ceff712d45e2f8b60a8cba6e81116f683523b3f62b716119cd92"
    assert content_key("judgement", trace="t", model="m") == content_key("judgement", model="m", trace="t") == expected


def test_content_keys_differ_by_kind_name_type_and_value():
    parts = [{"a": 1}, {"a": 1.0}, {"a": True}, {"a": "1"}, {"a": None}, {"b": 1}, {"a": 1, "b": None}, {}]
    keys = {content_key(kind, **p) for kind in ("judgement", "rubric") for p in parts}
    keys |= {content_key("judgement", kind="x"), content_key("judgement", a="é"), content_key("judgement", a="e\u0301")}
    assert len(keys) == 2 * len(parts) + 3


def test_a_content_key_has_no_way_to_write_two_things_alike():
    with pytest.raises(TypeError, match="the part a of a content key is a list"):
        content_key("judgement", a=["x"])
    with pytest.raises(ValueError):
        content_key("judgement", a=float("nan"))
