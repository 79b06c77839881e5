"""The table of base, primed and final model."""

import io
import json

from rich.console import Console

from exprl_megatron.evaluation.pass_at_k import PassAtK
from exprl_megatron.evaluation.table import evaluation_record, evaluation_table

EVALUATIONS = {
    "base": [PassAtK(1, 0.02, 0.01, 0.034, 50), PassAtK(16, 0.2, 0.1, 0.3, 50)],
    "primed": [PassAtK(1, 0.1, 0.08, 0.12, 50)],
}


def test_the_table_has_a_row_for_each_model_with_intervals_and_gains():
    console = Console(file=io.StringIO(), width=120)
    console.print(evaluation_table(EVALUATIONS, "held-out problems", 0.95))
    text = console.file.getvalue()
    assert "2.0 % [1.0, 3.4]" in text
    assert "20.0 % [10.0, 30.0]" in text
    assert "10.0 % [8.0, 12.0] +8.0" in text
    assert text.index("pass@1 ") < text.index("pass@16")
    assert "95% interval" in text


def test_the_record_is_json():
    record = json.loads(json.dumps(evaluation_record(EVALUATIONS)))
    assert record["primed"] == [{"k": 1, "mean": 0.1, "low": 0.08, "high": 0.12, "problems": 50}]
