import importlib.util
from pathlib import Path

TOOL = Path(__file__).parents[1] / "tools" / "prepare_data.py"


def load_tool():
    spec = importlib.util.spec_from_file_location("prepare_data", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_gsm8k_has_its_hundred_questions_with_worked_solutions():
    records = {record["id"]: record for record in load_tool().gsm8k()}
    assert len(records) == 100
    assert records["gsm8k-480"] == {
        "id": "gsm8k-480",
        "problem": "Ben has 4 tubes of blue paint and 3 tubes of yellow paint. Jasper has half as many tubes of blue "
        "paint as Ben, and three times as many tubes of yellow paint as Ben. How many tubes of paint does Jasper have?",
        "reference": "Jasper has 4*1/2= 2 tubes of blue paint\nJasper has 3*3=9 tubes of yellow paint\n"
        "Jasper has a total of 2+9 =11 tubes of paint\n#### 11",
        "answer": "11",
    }
