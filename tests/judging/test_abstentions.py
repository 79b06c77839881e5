"""Too many abstentions stop the run, with the reasons counted."""

import pytest

from exprl_megatron.errors import RunStopped
from exprl_megatron.judging.abstentions import AbstentionWindow, check_abstention_rate, count_abstentions
from exprl_megatron.judging.judgement import Abstained, Scored

MIXED = [Scored(1.0), Abstained("timeout"), Abstained("unreadable", "I would\nrather not"), Abstained("unreadable")]


def test_reasons_are_counted():
    assert count_abstentions(MIXED) == {"unreadable": 2, "timeout": 1}


def test_a_rate_up_to_the_bound_passes():
    check_abstention_rate(MIXED, 0.75, "step 1")
    check_abstention_rate([Scored(0.0)], 0.0, "step 1")
    check_abstention_rate([], 0.0, "step 1")


def test_a_rate_above_the_bound_stops_with_counts_and_an_example():
    with pytest.raises(RunStopped) as caught:
        check_abstention_rate(MIXED, 0.5, "stage priming, step 3")
    message = str(caught.value)
    assert message.startswith(
        "stage priming, step 3: of the last 4 judgements 3 are abstentions (unreadable 2, timeout 1)"
    )
    assert "max_abstention_rate (0.5)" in message
    assert "I would rather not" in message


def test_the_window_spans_steps_and_forgets_what_is_older():
    window = AbstentionWindow(0.5, 4)
    good, bad = Scored(1.0), Abstained("timeout", "no answer within 3 s")
    window.add([good, good], "step 1")
    window.add([bad, bad], "step 2")
    window.add([good, good, good, bad], "step 3")
    with pytest.raises(RunStopped, match=r"step 4: of the last 4 judgements 3 .*timeout.*'no answer within 3 s'"):
        window.add([bad, bad], "step 4")


def test_a_window_that_is_not_full_counts_as_it_is():
    with pytest.raises(RunStopped, match="of the last 1 judgements 1 "):
        AbstentionWindow(0.5, 512).add([Abstained("refused")], "step 1")
