"""Slurm's signal ahead of a time limit comes after the job has started."""

import nemo_run as run
import pytest

from exprl_megatron.errors import UserError
from recipes.executors import check_executor
from recipes.time_limits import SIGNAL, check_time_limit, seconds_of


@pytest.mark.parametrize(
    ("limit", "seconds"),  # the forms of `man sbatch`, --time
    [
        ("30", 1800),
        ("30:15", 1815),
        ("04:00:00", 14400),
        ("1-2", 93600),
        ("1-02:03", 93780),
        ("2-00:00:01", 172801),
        ("UNLIMITED", None),
        ("soon", None),
        ("1:2:3:4", None),
    ],
)
def test_each_of_slurm_s_forms_of_a_time_is_read(limit, seconds):
    assert seconds_of(limit) == seconds


@pytest.mark.parametrize(
    ("limit", "signal"), [("15", SIGNAL), ("00:20:00", SIGNAL), ("1", "B:USR1"), ("5", "USR1@300")]
)
def test_a_time_limit_within_the_signal_s_lead_is_refused(limit, signal):
    with pytest.raises(UserError, match=rf"run\.executor\.time is {limit}, .*, which is when it starts"):
        check_time_limit(limit, signal)


@pytest.mark.parametrize(
    ("limit", "signal"), [("00:20:01", SIGNAL), ("15", "B:USR1@600"), ("15", None), ("UNLIMITED", SIGNAL)]
)
def test_a_time_limit_beyond_the_signal_s_lead_is_taken(limit, signal):
    check_time_limit(limit, signal)


def test_an_executor_is_refused_before_anything_is_submitted():
    with pytest.raises(UserError, match="asks the run to stop 1200 s before"):
        check_executor(run.SlurmExecutor(account="research", time="00:10:00", signal=SIGNAL))
