import fp8_table
import pytest

from exprl_megatron.models.architecture import FAMILIES, read_architecture


def test_the_page_has_the_table_of_today_s_refusals():
    text = fp8_table.PAGE.read_text(encoding="utf-8")
    assert fp8_table.BEGIN in text and fp8_table.END in text
    assert fp8_table.page(text) == text, "run python tools/fp8_table.py"


def test_every_family_is_in_it():
    families = {read_architecture(directory).family for directory in fp8_table.PUBLISHED.iterdir()}
    assert families == set(FAMILIES.values())


@pytest.mark.parametrize(
    ("model", "kind", "expected"),
    [
        # Megatron's and cuBLAS's multiples: 29,568 / 8 = 3,696 = 16 x 231, no multiple of 32.
        ("qwen2.5-72b", "mxfp8", "1, 2, 4; not 8: 3,696 of 29,568 MLP columns a rank"),
        ("qwen2.5-72b", "fp8-tensorwise", "1, 2, 4, 8"),
        ("qwen3.5-27b", "fp8-blockwise", "no"),
    ],
)
def test_a_cell_has_the_sizes_and_the_reason(model, kind, expected):
    architecture = read_architecture(fp8_table.PUBLISHED / model)
    assert fp8_table.cell(architecture, kind, [1, 2, 4, 8]) == expected
