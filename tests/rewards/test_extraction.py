"""Where a trace's final answer is looked for."""

import pytest

from exprl_megatron.rewards.extraction import extract_answer


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
