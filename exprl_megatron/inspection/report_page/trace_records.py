"""Groups of the rollout log as a page's trace browser reads them; all texts are made safe to display."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from exprl_megatron.inspection.report_page.judge_figures import reason_word
from exprl_megatron.inspection.rollout_steps import InspectedGroup, TokenAdvantages, span_advantage
from exprl_megatron.inspection.rollout_tables import HASH_DIGITS, versions_text
from exprl_megatron.inspection.trace_text import PolicyTokenizer
from exprl_megatron.judging.judgement import Abstained, Judgement
from exprl_megatron.problems.problem import Problem
from exprl_megatron.reporting.plain_text import escaped
from exprl_megatron.rollout.group import GradedTrace

Places = Callable[[int], int]
"""Maps a number of a trace's first tokens to the number of characters of its text that they give."""
Asked = Callable[[str | None], dict[str, Any] | None]
"""Of a judgement's hash: what the judge was asked; see JudgeWords."""


class TraceRecords:
    """Makes records of groups; without references it leaves out every text that the judging side read or wrote."""

    def __init__(
        self,
        tokenizer: PolicyTokenizer,
        problems: Mapping[str, Problem],
        asked: Asked,
        references: bool,
    ):
        self._tokenizer = tokenizer
        self._problems = problems
        self._asked = asked
        self._references = references

    def group(self, inspected: InspectedGroup) -> dict[str, Any]:
        """Return {number, problem, domain, prompt, reference, answer}; its traces are records of their own."""
        group = inspected.group
        problem = self._problems.get(group.problem_id)
        record = {
            "number": inspected.number,
            "problem": escaped(group.problem_id),
            "domain": group.domain,
            "prompt": self._prompt(group.samples[0], problem),
        }
        if self._references and problem is not None:
            reference = problem.reference
            record["reference"] = None if reference is None else escaped(reference.for_judge())
            record["answer"] = None if problem.answer is None else escaped(problem.answer)
        return record

    def row(self, inspected: InspectedGroup, place: int) -> dict[str, Any]:
        """Return the figures of one trace, without any text."""
        sample = inspected.group.samples[place]
        learned = inspected.advantages is not None
        advantages = None if inspected.advantages is None else inspected.advantages[place]
        tokens = len(sample.trace.token_ids)
        return {
            "sample": sample.trace.sample,
            **_verdict(sample.judgement),
            "verified": None if sample.verified is None else _verdict(sample.verified),
            "advantage": None if sample.segments else _rounded(span_advantage(advantages, 0, tokens)),
            "out": learned and advantages is None,
            "tokens": tokens,
            "finish": escaped(sample.trace.finish_reason),
            "weights": escaped(versions_text(sample.trace)),
            "hash": (sample.judgement.hash or "")[:HASH_DIGITS],
        }

    def texts(self, inspected: InspectedGroup, place: int) -> dict[str, Any]:
        """Return {segments, words, finding, tokens}: the response in the pieces that were judged, and what judge and
        verifier said about them.
        """
        sample = inspected.group.samples[place]
        advantages = None if inspected.advantages is None else inspected.advantages[place]
        places = self._tokenizer.characters_before(sample.trace)
        record: dict[str, Any] = {"segments": self._segments(sample, advantages, places)}
        record["tokens"] = _tokens(sample, places, inspected.gap(place))
        if sample.segments and places is None:
            record["uncut"] = True
        if not sample.segments:
            record["judged"] = self._judged(sample.judgement)
        if self._references and sample.verified is not None:
            record["finding"] = escaped(sample.verified.evidence)
        return record

    def _segments(
        self, sample: GradedTrace, advantages: TokenAdvantages, places: Places | None
    ) -> list[dict[str, Any]]:
        text = sample.trace.text
        if not sample.segments:
            return [{"text": escaped(text)}]
        starts = [0] if places is None else [places(segment.start) for segment in sample.segments]
        texts = [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
        texts += [""] * (len(sample.segments) - len(texts))
        return [
            {
                "text": escaped(piece),
                "tokens": [segment.start, segment.end],
                **_verdict(segment.judgement),
                "advantage": _rounded(span_advantage(advantages, segment.start, segment.end)),
                "hash": (segment.judgement.hash or "")[:HASH_DIGITS],
                "judged": self._judged(segment.judgement),
            }
            for piece, segment in zip(texts, sample.segments, strict=True)
        ]

    def _judged(self, judgement: Judgement) -> dict[str, Any] | None:
        """Return the questions and replies; None without references, which judges and verifiers quote."""
        if not self._references:
            return None
        return {"words": escaped(judgement.evidence), "asked": self._asked(judgement.hash)}

    def _prompt(self, sample: GradedTrace, problem: Problem | None) -> str | None:
        """Return what the policy read; the problem's statement where its tokenizer is missing."""
        if self._tokenizer.tokenizer is not None:
            return escaped(self._tokenizer.tokenizer.decode(sample.trace.prompt_ids, skip_special_tokens=True))
        return None if problem is None else escaped(problem.statement)


def _verdict(judgement: Judgement) -> dict[str, Any]:
    if isinstance(judgement, Abstained):
        return {"score": None, "reason": reason_word(judgement.reason)}
    return {"score": _rounded(judgement.value)}


def _tokens(sample: GradedTrace, places: Places | None, gap: np.ndarray | None) -> dict[str, list] | None:
    """Return {characters, log_probs, gaps}: of each token its number of characters, and its log-prob in thousandths of
    a nat.

    `gaps`, only where the run keeps the trainer's log-probs: trainer's less sampler's in nats, to two digits.
    """
    if places is None:
        return None
    count = len(sample.trace.token_ids)
    ends = [places(token) for token in range(1, count + 1)]
    thousandths = np.rint(sample.trace.log_probs.astype(np.float64) * 1000).astype(np.int64)
    record = {"characters": np.diff(ends, prepend=0).tolist(), "log_probs": thousandths.tolist()}
    return record if gap is None else record | {"gaps": [float(f"{value:.1e}") for value in gap.tolist()]}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
