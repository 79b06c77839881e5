"""Which part of a text is the answer, in the formats in which models think."""

import pytest

from exprl_megatron.utils.thinking import mask_thinking


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("plain", "plain"),
        ("<think>a</think>b", "b"),
        ("<THINK>a</Think>b", "b"),
        ("a</think>b", "b"),
        ("<think>a", ""),
        ("b <think>a", "b "),
        ("<think>a <think> again</think>b", "b"),
        ("<think>a</think>b<think>c</think>d", "bd"),
        ("<think></think>b", "b"),
        ("<thinking>a</thinking>b", "b"),
        ("<thought>a</thought>b", "b"),
        ("<reasoning>a</reasoning>b", "b"),
        ("<seed:think>a</seed:think>b", "b"),
        ("[THINK]a[/THINK]b", "b"),
        ("◁think▷a◁/think▷b", "b"),
        ("<|begin_of_thought|>a<|end_of_thought|>b", "b"),
        ("<|START_THINKING|>a<|END_THINKING|>b", "b"),
        ("<|channel>thought\na<channel|>b", "b"),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b<|return|>", "b"),
        ("<|channel|>analysis<|message|>a", ""),
        ("<|channel|>commentary to=f <|constrain|>json<|message|>a<|call|>", ""),
        ("analysisWe see.assistantfinalb", "b"),
        ("analysisWe see", ""),
        ("analysis of a", "analysis of a"),
        ("I think> a", "I think> a"),
        ("", ""),
    ],
)
def test_the_answer_is_what_is_outside_of_thinking_blocks(text, answer):
    masked = mask_thinking(text)
    assert masked.replace("\n", "") == answer
    assert len(masked) == len(text)
    assert all(kept in ("\n", own) for kept, own in zip(masked, text, strict=True))
