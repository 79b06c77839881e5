import math

import pytest

from exprl_megatron.judging.judgement import Scored


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.01, 1.01, 7.0])
def test_a_score_is_a_number_between_0_and_1(value):
    with pytest.raises(ValueError, match="a score is in"):
        Scored(value)
    assert [Scored(edge).value for edge in (0, 1)] == [0, 1]
