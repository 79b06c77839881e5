"""The test backend does what NCCL does: torch's and NCCL's documentation say what that is (see nccl_like)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from nccl_like.records import read_records

# Fifty processes side by side, some of which are late or hang; only slow tests run over this backend.
pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """The directory with what every member of every scenario of members.py said and recorded."""
    out = tmp_path_factory.mktemp("played")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    command = [sys.executable, "-W", "ignore", str(HERE / "members.py"), str(out)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return out


@pytest.fixture
def words(played, request):
    """What the members of the test's scenario said, by rank."""
    return json.loads((played / "words.json").read_text())[request.param]


def scenario(*names):
    return pytest.mark.parametrize("words", names, indirect=True)


def kinds(played: Path, name: str) -> list[str]:
    return [one["kind"] for one in read_records(played / name) if one["kind"] != "connected"]


@scenario("values")
def test_collectives_batches_and_sends_give_what_gloo_would(words):
    assert [word[0] for word in words] == [[3.0, 3.0]] * 3
    assert [word[1] for word in words] == [[[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]] * 3
    assert [word[2] for word in words] == [[2.0, 2.0], [0.0, 0.0], [1.0, 1.0]]
    assert [word[3] for word in words] == [[0.0, 0.0], [0.0, 0.0], [2.0, 2.0]]
    assert [word[4] for word in words] == [[2.0, 2.0]] * 3


@scenario("first_operation")
def test_the_first_operation_blocks_its_caller_until_all_have_come_and_later_ones_do_not(words):
    assert words == [True] * 3


@scenario("first_operation_of_a_pair")
def test_so_does_the_first_send_between_two_ranks(words):
    assert words == [True] * 2


@scenario("first_operation_without_end")
def test_no_timeout_ends_the_first_operation(words):
    assert words == ["hangs"] * 3


@scenario("first_operation_reported")
def test_where_patience_is_bounded_the_report_names_who_is_missing_and_where_it_is_waited(played, words):
    for rank in (0, 2):
        assert (
            f"(allreduce 1 x torch.float32 RedOpType.SUM) on thread MainThread: rank {rank} of 3 waits for 1\n"
            in (words[rank])
        )
        assert "in first_operation_reported" in words[rank]
    assert kinds(played, "first_operation_reported") == ["hang", "hang"]


@pytest.mark.parametrize(
    "words, says",
    [
        ("another_order", ["allreduce 2 x", "broadcast 2 x"]),
        ("another_size", ["3 x torch.float32", "2 x torch.float32"]),
        ("another_dtype", ["torch.int32", "torch.float32"]),
        ("another_root", ["root 0", "root 1"]),
        ("both_send", ["0 sends to 1", "1 sends to 0"]),
    ],
    indirect=["words"],
)
def test_members_that_call_something_else_are_all_shown_what_each_called(words, says):
    for word in words:
        assert "operation 1 differs between members" in word
        assert f"rank 0: {says[0]}" in word or says[0] in word
        assert says[1] in word


@scenario("another_size_in_a_batch")
def test_a_batch_that_expects_another_size_than_is_sent_is_reported(played, words):
    assert "rank 1 expects 3 x torch.float32 of rank 0, which sends [2," in words[1]
    assert "differs" in kinds(played, "another_size_in_a_batch")


@scenario("in_order")
def test_a_later_operation_waits_for_an_earlier_one(words):
    assert words[1] == [False, False]


@scenario("same_device")
def test_two_members_on_one_device_are_refused(played, words):
    assert all("duplicate device: the members declare cuda:0, cuda:1, cuda:1" in word for word in words)
    assert set(kinds(played, "same_device")) == {"same device"}


@scenario("destroyed_with_work")
def test_destroying_with_work_in_flight_waits_until_it_is_aborted(words):
    assert words[0].startswith("True: ") and words[0].endswith("was aborted")


@scenario("destroyed_side_by_side")
def test_destroying_waits_for_the_other_members(words):
    assert words == [True] * 2


@scenario("broken_member")
def test_a_member_that_aborts_is_not_noticed_before_the_timeout_or_an_abort(words):
    assert words[0].startswith("False: ") and "was not done within the group's timeout of 4 s" in words[0]
    assert words[2].startswith("False: ") and words[2].endswith("was aborted")


@scenario("dead_member")
def test_a_member_that_dies_is_not_noticed_before_the_timeout(words):
    assert "was not done within the group's timeout of 4 s" in words[0]


@scenario("objects")
def test_objects_over_the_group_are_recorded_with_who_sent_them(played, words):
    assert words == [[[{"from": 0}], [0, 1]]] * 2
    found = [one["text"] for one in read_records(played / "objects", "object")]
    assert len(found) == 3
    assert all("members.py" in text and text.endswith("in objects") for text in found)
    assert sum(text.startswith("dict from") for text in found) == 1


@scenario("product_breaks_off", "product_leaves_what_does_not_connect")
def test_weights_groups_are_given_up_at_once_whatever_is_in_flight_and_new_ones_are_formed(words):
    assert words == [2.0, 2.0]


@scenario("product_destroys")
def test_weights_groups_are_destroyed_with_the_others_or_aborted_after_the_deadline(words):
    waited, alone_s = words[0]
    assert waited and alone_s > 1.8


@scenario("product_objects")
def test_ranks_exchange_objects_over_another_group_than_tensors(played, words):
    assert words[0] == [{"only": "rank 0"}, [0, 1], [1, [0, 1]]]
    assert words[1] == [{"only": "rank 0"}, None, [1, [0, 1]]]
    assert read_records(played / "product_objects", "object") == []


@scenario("product_broadcasts")
def test_a_server_that_receives_when_it_is_asked_gets_every_broadcast_from_the_first_on(words):
    connecting = [None, 0]
    first = [[None, 64], [None, 128], ["v1", 192]]
    assert words[1] == [connecting, *first, [None, 64], ["v2", 128]]
