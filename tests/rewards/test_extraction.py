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
        (r"\boxed{5} then \boxed{  } #### 6", "5"),
        (r"\boxed{1},\boxed{2}", "1, 2"),
        (r"$\boxed{1}$ and $\boxed{2}$", "1, 2"),
        (r"x = \boxed{1}, y = \boxed{2}", "x = 1, y = 2"),
        (r"\boxed{3} papers and \boxed{1} bins", "3, 1"),
        (r"We get \boxed{3}, so the answer is \boxed{6}.", "6"),
        (r"<think>\boxed{1}</think>The answer is 6.", "6"),
        (r"<think>\boxed{1}", None),
        ("The answer is **7**. I hope it is correct.", "**7**"),
        ("The answer is not 7.", None),
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
        ("  ``` python\n  a\n  ```", "a"),
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
