import json
import sqlite3
import subprocess
import sys
import time
import zlib
from contextlib import closing
from pathlib import Path
from random import Random

import pytest
from store_writer import key_of

from exprl_megatron.errors import UserError
from exprl_megatron.judging.champ import champ_problems
from exprl_megatron.judging.content_key import content_key
from exprl_megatron.judging.judgement import Abstained, Scored
from exprl_megatron.judging.prompt import shipped_prompt
from exprl_megatron.judging.store import JudgementStore
from exprl_megatron.judging.store_rows import StoredQuestion

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
        store.add_judgement(KEY, {"trace": "x"}, "the whole answer", judgement)
    with JudgementStore(file) as store:
        found = store.find_judgement(KEY)
    assert found == judgement
    if isinstance(judgement, Scored):
        assert found.value.hex() == judgement.value.hex()


def test_a_rubric_comes_back_exactly(store):
    rubric = json.dumps({"checkpoints": [{"claim": "x = \\frac{1}{2}", "weight": 0.1}]})
    store.add_rubric(KEY, {"reference": "r"}, f"Here it is: {rubric}", rubric)
    assert store.find_rubric(KEY) == rubric


def test_what_was_never_kept_is_none(store):
    assert store.find_judgement(KEY) is None
    assert store.find_rubric(KEY) is None


def test_the_first_of_two_judgements_under_one_key_stays(store):
    store.add_judgement(KEY, {}, "first", Scored(0.25))
    store.add_judgement(KEY, {}, "second", Scored(0.75))
    store.add_rubric(KEY, {}, "first", "[1]")
    store.add_rubric(KEY, {}, "second", "[2]")
    assert store.find_judgement(KEY) == Scored(0.25)
    assert store.find_rubric(KEY) == "[1]"


@pytest.mark.parametrize("reason", ["timeout", "server-error"])
def test_a_failure_of_the_servers_is_not_kept_and_a_later_verdict_is(store, reason):
    store.add_judgement(KEY, {}, "", Abstained(reason))
    assert store.find_judgement(KEY) is None
    store.add_judgement(KEY, {}, "Score: 5", Scored(1.0))
    assert store.find_judgement(KEY) == Scored(1.0)


@pytest.mark.parametrize("value", [-0.25, 1.5, float("nan")])
def test_a_score_outside_the_unit_interval_is_a_defect_of_the_caller(store, value):
    with pytest.raises(ValueError, match="a score is in"):
        store.add_judgement(KEY, {}, "", Scored(value))


def test_a_resumed_run_asks_only_for_what_it_has_not(tmp_path):
    asked = []

    def judgement(store: JudgementStore, number: int):
        found = store.find_judgement(key_of(number))
        if found is None:
            asked.append(number)
            found = Scored(number / 7)
            store.add_judgement(key_of(number), {"number": number}, "", found)
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
        store.add_judgement(KEY, {}, "after the kill", Scored(1.0))
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
    with pytest.raises(UserError, match=r"other\.sqlite is not a judgement store"):
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
            store.add_judgement(key_of(number), {"text": "x" * 100}, "y" * 400, Scored(0.5))
    content = bytearray(file.read_bytes())
    content[4096 : len(content)] = b"\x5a" * (len(content) - 4096)
    file.write_bytes(content)
    with JudgementStore(file) as store, pytest.raises(UserError, match=r"s\.sqlite cannot be used \(.*malformed"):
        store.find_judgement(key_of(3))


@pytest.mark.parametrize("value", [7.0, -0.5, None, "x"])
def test_a_score_that_is_none_is_a_damaged_store(tmp_path, value):
    file = tmp_path / "s.sqlite"
    with JudgementStore(file) as store:
        store.add_judgement(key_of(1), {"text": "x"}, "y", Scored(0.5))
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute("UPDATE judgements SET value = ?", (value,))
    with JudgementStore(file) as store, pytest.raises(UserError, match=r"s\.sqlite cannot be used"):
        store.find_judgement(key_of(1))


def test_a_row_is_found_by_the_beginning_of_its_hash(store):
    store.add_judgement("a" * 64, {"trace": "t"}, "Score: 4", Scored(0.75, "Score: 4"))
    store.add_judgement("a" * 10 + "b" * 54, {}, "", Abstained("refused"))
    store.add_rubric("c" * 64, {"reference": "r"}, "raw", "{}")
    entry = store.entry("AAAAAAAAAAA")
    assert (entry.key, entry.question, entry.answer, entry.result) == (
        "a" * 64,
        {"trace": "t"},
        "Score: 4",
        Scored(0.75, "Score: 4"),
    )
    assert store.entry("c" * 64).result == "{}"
    with pytest.raises(UserError, match=f"2 hashes in .* begin with aaaaaa: {'a' * 16}, {'a' * 10}bbbbbb; give more"):
        store.entry("aaaaaa")


def test_an_unknown_hash_is_answered_with_those_that_are_near(store):
    with pytest.raises(UserError, match="the newest ones are none, since the store is empty"):
        store.entry("abcdef")
    store.add_judgement("a" * 64, {}, "", Scored(0.5))
    with pytest.raises(UserError, match=f"similar ones are {'a' * 16}"):
        store.entry("a" * 20 + "f")
    with pytest.raises(UserError, match=f"the newest ones are {'a' * 16}"):
        store.entry("f" * 8)


@pytest.mark.parametrize("prefix", ["abcde", "", "xyzxyz", "abc%__"])
def test_what_is_not_a_hash_is_refused(store, prefix):
    with pytest.raises(UserError, match="is not a hash; give at least 6"):
        store.entry(prefix)


def test_the_newest_rows_come_first(store):
    for number in range(4):
        store.add_judgement(key_of(number), {}, "", Scored(0.5))
    assert [entry.key for entry in store.newest(2)] == [key_of(3), key_of(2)]


def kept_soon(store, key, asked, answer, judgement):
    return store.submit_judgements(
        [(key, asked if isinstance(asked, StoredQuestion) else StoredQuestion.from_dict(asked), answer, judgement)]
    )


def asked_about(text: str, shown: int, **changes) -> StoredQuestion:
    messages = [{"role": "system", "content": "Be strict."}, {"role": "user", "content": ["<t>", "</t>"]}]
    return StoredQuestion(json.dumps({"problem": "p", "messages": messages} | changes).encode(), text, shown)


@pytest.mark.parametrize("text", ["Let x be 3.\n\nSo it is.", "", "步骤🙂e\u0301", "lone \ud83d, null \x00"])
def test_what_was_asked_about_a_beginning_comes_back_to_the_character(store, text):
    for shown in range(len(text) + 1):
        store.add_judgement(key_of(shown), asked_about(text, shown), f"about {shown}", Scored(0.5, "because"))
    for shown in range(len(text) + 1):
        entry = store.entry(key_of(shown))
        system, user = entry.question["messages"]
        assert (system["content"], user["content"]) == ("Be strict.", f"<t>{text[:shown]}</t>")
        assert (entry.answer, entry.result) == (f"about {shown}", Scored(0.5, "because"))
        assert entry.question["problem"] == "p"


def long_texts(tree) -> list[str]:
    """What models wrote about a problem of CHAMP."""
    if isinstance(tree, str):
        return [tree] if len(tree) > 400 else []
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return list(dict.fromkeys(text for part in inner for text in long_texts(part)))


def test_a_judgement_takes_little_more_than_its_answer(tmp_path):
    """Traces of 6,600 tokens (3.5 characters each) in ten beginnings, 16 to a problem; answers of 1,600 characters."""
    random, rows = Random(0), 0
    system = shipped_prompt("math", "prefix", "reference").system
    records = [(name, long_texts(record)) for name, record in champ_problems().items()]
    with JudgementStore(tmp_path / "s.sqlite") as store:
        for name, texts in random.sample([record for record in records if len(record[1]) > 60], 4):
            random.shuffle(texts)
            traces, answers = texts[::2], texts[1::2]
            for _ in range(16):
                text = "\n\n".join(random.sample(traces, min(len(traces), 40)))[:23_100]
                for prefix in range(1, 11):
                    asked = asked_about(text, prefix * len(text) // 10, problem=name, system=system, rubric=texts[0])
                    answer = "".join(random.choices(answers, k=4))[:1600]
                    kept_soon(store, key_of(rows), asked, answer, Scored(0.5, answer))
                    rows += 1
    assert (tmp_path / "s.sqlite").stat().st_size / rows < 1200


def test_texts_that_many_questions_share_are_there_once(store):
    text = "So x is 3 and y is 4. " * 10
    for number in range(20):
        store.add_judgement(key_of(number), asked_about(text, 10 * number), "Score: 3", Scored(0.5, "Score: 3"))
    with sqlite3.connect(store.path) as connection:
        assert connection.execute("SELECT count(*) FROM texts").fetchone() == (2,)
    assert {entry.question["messages"][1]["content"][3:-4] for entry in store.newest(20)} == {
        text[: 10 * number] for number in range(20)
    }


def test_all_that_waits_is_written_together_and_is_there_when_its_future_is_done(store):
    statements = []
    store._writer.connection.set_trace_callback(statements.append)
    with store._writer.lock:  # the writer's thread waits here with the first row
        first = kept_soon(store, key_of(0), {}, "", Scored(0.5))
        while store._waiting:
            time.sleep(0.001)
        others = [kept_soon(store, key_of(number), {}, "", Scored(0.5)) for number in range(1, 50)]
        assert not any(future.done() for future in (first, *others))
    for number, future in enumerate((first, *others)):
        future.result()
        assert store.find_judgement(key_of(number)) == Scored(0.5)
    assert statements.count("COMMIT") == 2


def test_a_failed_write_is_an_error_for_each_that_waited_and_the_next_is_written(store):
    with closing(sqlite3.connect(store.path)) as other:
        other.execute("CREATE TRIGGER full BEFORE INSERT ON judgements BEGIN SELECT raise(ABORT, 'full'); END")
    failed = [kept_soon(store, key_of(number), {"a": number}, "", Scored(0.5)) for number in range(3)]
    for future in failed:
        with pytest.raises(sqlite3.IntegrityError, match="full"):
            future.result()
    with closing(sqlite3.connect(store.path)) as other:
        other.execute("DROP TRIGGER full")
    store.add_judgement(key_of(1), {"a": 1}, "now", Scored(0.25))
    assert store.entry(key_of(1)).question == {"a": 1}
    assert store.find_judgement(key_of(0)) is None


def test_who_waits_no_longer_takes_nothing_back(store):
    with store._writer.lock:
        future = kept_soon(store, KEY, {}, "", Scored(0.5))
        assert not future.cancel()
    future.result()
    assert store.find_judgement(KEY) == Scored(0.5)


def store_of_version_1(path: Path) -> None:
    """As the program wrote it before judgements shared their texts."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript((Path(__file__).parent / "store_version_1.sql").read_text())
        asked = zlib.compress(json.dumps({"problem": "p1", "messages": [{"role": "user", "content": "a"}]}).encode())
        for row in (
            ("a1" * 32, asked, "Score: 4", 0.75, None, None, 1.0),
            ("b2" * 32, asked, "no", None, "refused", "", 2.0),
        ):
            columns = "key, asked, answer, value, reason, evidence, created"
            connection.execute(f"INSERT INTO judgements ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        connection.execute("INSERT INTO rubrics VALUES (?, ?, 'raw', '{}', 3.0)", ("c3" * 32, asked))
        connection.commit()


def test_a_store_of_version_1_is_read_and_continues(tmp_path):
    file = tmp_path / "s.sqlite"
    store_of_version_1(file)
    for _ in range(2):
        with JudgementStore(file) as store:
            assert store.find_judgement("a1" * 32) == Scored(0.75, "Score: 4")
            assert store.find_judgement("b2" * 32) == Abstained("refused", "")
            assert store.find_rubric("c3" * 32) == "{}"
            entry = store.entry("a1a1a1")
            assert entry.question == {"problem": "p1", "messages": [{"role": "user", "content": "a"}]}
            assert (entry.key, entry.answer, entry.created) == ("a1" * 32, "Score: 4", 1.0)
            store.add_judgement(KEY, {"new": 1}, "new", Scored(1.0))
            assert [entry.key for entry in store.newest(3)] == [KEY, "c3" * 32, "b2" * 32]
    assert integrity(file) == "ok"


def test_two_processes_may_bring_a_store_up_to_date_at_once(tmp_path):
    file = tmp_path / "s.sqlite"
    store_of_version_1(file)
    for process in [start_writer(file, first, first + 20, 0.5) for first in (0, 10, 0)]:
        assert process.communicate()[0] and process.returncode == 0
    with JudgementStore(file) as store:
        assert len(store.newest(100)) == 33


@pytest.mark.parametrize("table", ["judgements", "judgements_1", "rubrics"])
def test_looking_for_a_key_and_for_the_newest_reads_no_more_rows_than_it_shows(tmp_path, table):
    file = tmp_path / "s.sqlite"
    store_of_version_1(file)
    statements = []
    with JudgementStore(file) as store:
        store._reader.connection.set_trace_callback(statements.append)
        store.newest(20), store.find_judgement(KEY), store.find_rubric(KEY)
        with pytest.raises(UserError):
            store.entry("abcdef")
        store._reader.connection.set_trace_callback(None)
        plans = {
            statement: [row[-1] for row in store._reader.connection.execute(f"EXPLAIN QUERY PLAN {statement}")]
            for statement in statements
            if f"FROM {table} " in statement
        }
    assert {statement.partition(f"FROM {table} ")[2][:8] for statement in plans} == {"WHERE ke", "ORDER BY"}
    for statement, (plan,) in plans.items():
        # Read from its end, no more than the limit is read of a table; what is sorted would be read whole.
        assert "USING INDEX" in plan if "WHERE" in statement else plan == f"SCAN {table}"


def test_a_store_that_may_not_be_written_to_is_read_and_nothing_is_made_beside_it(tmp_path, monkeypatch):
    file = tmp_path / "s.sqlite"
    with JudgementStore(file) as store:
        store.add_judgement(KEY, {"trace": "x"}, "answer", Scored(0.5, "answer"))
    # As os.access says in a directory of another user; tests may be root's, whom nothing stops.
    monkeypatch.setattr("exprl_megatron.judging.store_file.os.access", lambda path, mode: False)
    with JudgementStore(file, read_only=True) as store:
        assert store.find_judgement(KEY) == Scored(0.5, "answer")
        assert [path.name for path in tmp_path.iterdir()] == ["s.sqlite"]
        with pytest.raises(UserError, match="cannot be used"):
            store.add_rubric("0" * 64, {}, "answer", "{}")


def test_a_store_that_another_process_writes_is_read_with_its_newest_rows(tmp_path, monkeypatch):
    file = tmp_path / "s.sqlite"
    with JudgementStore(file) as writer:
        writer.add_judgement(KEY, {"trace": "x"}, "answer", Scored(0.5, "answer"))
        monkeypatch.setattr("exprl_megatron.judging.store_file.os.access", lambda path, mode: False)
        with JudgementStore(file, read_only=True) as store:
            assert store.find_judgement(KEY) == Scored(0.5, "answer")
