"""What a report computes of a run's files."""

import os

from exprl_megatron.inspection.report_page.run_figures import evaluation_names
from exprl_megatron.runs.directory import RunDirectory


def test_evaluations_are_in_the_order_of_the_run_whatever_the_times_of_their_files(tmp_path):
    made = ["start", "warm/step-2", "warm/step-10", "warm", "adapt/step-4", "adapt"]
    for age, name in enumerate(made):
        path = tmp_path / "evaluations" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (1000 - age, 1000 - age))
    assert evaluation_names(RunDirectory(tmp_path), ["warm", "adapt"]) == made
