"""Where a trace's final answer and its final program are looked for."""

import pytest

from exprl_megatron.rewards.extraction import extract_answer, extract_program


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{1}, no: \boxed{ 36 }.", "36"),
        (r"\boxed{\frac{1}{2}} apples", r"\frac{1}{2}"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{x\right.}", r"\left\{x\right."),
        ("Natalia sold 72 clips.\n#### 72\n", "72"),
        ("#### 1\nno\n#### 1,200 ", "1,200"),
        ("### 7 + 5 = 12 ### 12 * 3 = 36 ans 36", "36"),
        ("ans 1 ### 12 * 3 = 36 ans 36 more", "36"),
        (r"#### 5, ans 6, \boxed{7}", "7"),
        ("### 7 + 5 = 12", None),
        ("##### 7", None),
        ("plans 36", None),
        ("ans", None),
        (r"\boxed{}", None),
        (r"\boxed{5} then \boxed{3", None),
        (r"\boxed{5} then \boxed{  } #### 6", None),
        (r"\boxed{" + "1" * 1001 + "}", None),
        ("#### \n", None),
        ("", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\na\nb\n```", "a\nb"),
        ("1.\n```python\na\n```\n2.\n```python\nb\n```\nDone.", "b"),
        ("```python\na\n```\n```\noutput\n```", "a"),
        ("```python\na\n```\n```text\noutput\n```", "a"),
        ("```\na\n```\n```\nb\n```", "b"),
        ("```py\na\n```", "a"),
        ("```Python3\r\na\r\n```\r\n", "a"),
        ("  ``` python\n  a\n  ```", "  a"),
        ("```\n```python\na\n```", "a"),
        ("```python\nx = '```'\n```", "x = '```'"),
        ("```python\n```", ""),
        ("```python\na\n```\n```python\nb", None),
        ("```cpp\na\n```", None),
        ("a", None),
        ("", None),
    ],
)
def test_extract_program(text, program):
    assert extract_program(text) == program
