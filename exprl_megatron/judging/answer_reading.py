"""The form of the judge's answers: the expression that constrains one, and its reading as a judgement."""

from collections.abc import Callable

from exprl_megatron.config.judging import JudgeConfig
from exprl_megatron.judging.answers import Answer
from exprl_megatron.judging.cases import Case
from exprl_megatron.judging.judgement import Abstained, Judgement, Scored
from exprl_megatron.judging.rubric import MARK_VALUES
from exprl_megatron.judging.verdict import (
    expected_score,
    normalize,
    read_marks,
    read_soundness,
    read_verdict,
    stated_score,
)

SCORE_REGEX = "Score: [1-5]"
SOUNDNESS_REGEX = r'Sound: (yes|no - "[^"\n]{1,160}")'


def answer_regex(case: Case) -> str:
    """Build the regular expression that constrains an answer to the verdict alone."""
    if case.rubric is None:
        return SCORE_REGEX
    marks = "|".join(MARK_VALUES)
    lines = [f"Mark {number}: ({marks})" for number in range(1, len(case.rubric.checkpoints) + 1)]
    return r"\n".join([*lines, SOUNDNESS_REGEX] if case.prompt.asks_soundness else lines)


def answer_reader(case: Case, config: JudgeConfig) -> Callable[[Answer], Judgement]:
    """Return the function that reads an answer about `case`: its score, or its marks where the case has a rubric."""
    rubric = case.rubric
    if rubric is None:
        return lambda answer: read_answer(answer, config)

    def marked(answer: Answer) -> Judgement:
        if answer.truncated:
            return Abstained("cut-off", answer.text)
        marks = read_marks(answer.text, len(rubric.checkpoints))
        soundness = read_soundness(answer.text) if case.prompt.asks_soundness else None
        if marks is None or (soundness is None and case.prompt.asks_soundness):
            return Abstained("unreadable", answer.text)
        sound = None if soundness is None else soundness.sound
        return Scored(rubric.score(marks, case.granularity, sound), answer.text)

    return marked


def read_answer(answer: Answer, config: JudgeConfig) -> Judgement:
    """Read the score that an answer states, or the expected score where `score_reading` is `expected`.

    An answer that the length limit cut off is an abstention, except for the released parser, which reads any text.
    Where the server does not report the probabilities of the digits, the stated digit is taken.
    """
    if answer.truncated and config.parser != "released":
        return Abstained("cut-off", answer.text)
    verdict = read_verdict(answer.text, config.parser)
    if config.score_reading == "stated" or not isinstance(verdict, Scored):
        return verdict
    stated = stated_score(answer.text, config.parser)
    probabilities = answer.digit_probabilities(stated.position) if stated is not None else None
    expected = expected_score(probabilities) if probabilities is not None else None
    return verdict if expected is None else Scored(normalize(expected), answer.text)
