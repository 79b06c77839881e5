"""Too many abstentions stop the run, with the reasons counted."""

import pytest

from exprl_megatron.errors import RunStopped
from exprl_megatron.judging.abstentions import check_abstention_rate, count_abstentions
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
    assert message.startswith("stage priming, step 3: 3 of 4 traces got no verdict (unreadable 2, timeout 1)")
    assert "max_abstention_rate (0.5)" in message
    assert "I would rather not" in message
