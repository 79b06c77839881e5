"""Builds the questions to a judge: the filled-in prompt, its key, and the form in which it is stored."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from exprl_megatron.config.judging import JudgeConfig
from exprl_megatron.judging.content_key import content_keys
from exprl_megatron.judging.injection_guard import InjectionGuard, control_token_pattern
from exprl_megatron.judging.judgement import Granularity
from exprl_megatron.judging.prompt import JudgePrompt, Measure, PromptFrame, load_prompt, shipped_prompt
from exprl_megatron.judging.rubric import Rubric
from exprl_megatron.judging.store_rows import StoredQuestion
from exprl_megatron.problems.problem import Problem

_FRAMES = 4096


@dataclass(frozen=True)
class Case:
    """One text to judge, with its prompt."""

    problem: Problem
    text: str
    sanitized: str
    """The text as the judge reads it (see InjectionGuard)."""
    longest: str
    """The longest of the texts that are judged together, sanitized."""
    rubric: Rubric | None
    granularity: Granularity
    prompt: JudgePrompt
    frame: PromptFrame
    key: str


class CaseBuilder:
    """Builds the cases of one judge; safe for use by several threads.

    Args:
        config: the section `judge` of the run's config.
        tokenizer: the judge's Hugging Face tokenizer; None for a closed API.
        identity: what distinguishes the judge from others; part of every key.
    """

    def __init__(self, config: JudgeConfig, tokenizer: Any, identity: Mapping[str, str]):
        self._config = config
        self._identity = identity
        self._overrides = _overrides(config)
        self._control = control_token_pattern(tokenizer)
        # A problem's frame is the same for all its traces.
        self._frame = lru_cache(_FRAMES)(self._new_frame)
        self._asked_frame = lru_cache(_FRAMES)(self._new_asked_frame)

    def build(
        self, problem: Problem, texts: Sequence[str], granularity: Granularity, rubric: Rubric | None
    ) -> list[Case]:
        """Build a case for each of `texts`; prefixes of the longest text cost little."""
        prompt = self._prompt(problem, granularity, rubric)
        hidden = problem.reference if self._config.show_reference else None
        reference = hidden.for_judge() if hidden is not None else None
        frame = self._frame(prompt, problem.statement, reference, rubric)
        guard = self.guard(prompt.tags)
        shown = guard.sanitize_all(texts)
        longest = max(shown, key=len, default="")
        keys = content_keys(
            *("judgement", "trace", texts),
            problem=problem.statement,
            reference=reference,
            rubric=rubric.to_json() if rubric is not None else None,
            prompt=prompt.version,
            granularity=granularity,
            **self._identity,
        )
        return [
            Case(problem, text, data, longest, rubric, granularity, prompt, frame, key)
            for text, data, key in zip(texts, shown, keys, strict=True)
        ]

    def stored_question(self, case: Case) -> StoredQuestion:
        """Return the question of a case in the form in which it is stored."""
        frame = self._asked_frame(case.problem.id, case.granularity, case.prompt, case.rubric, case.frame)
        trace = case.longest if case.longest.startswith(case.sanitized) else case.sanitized
        return StoredQuestion(frame, trace, len(case.sanitized))

    def guard(self, tags: frozenset[str]) -> InjectionGuard:
        """Return the guard for this judge and a prompt with these tags."""
        return InjectionGuard(
            tags,
            self._control,
            every_score=self._config.parser == "released",
            soundness=self._config.rubric.kind == "checkpoints",
        )

    def shows_reference(self, problem: Problem) -> bool:
        """Return whether the judge reads the problem's reference."""
        return self._config.show_reference and problem.reference is not None

    def _prompt(self, problem: Problem, granularity: Granularity, rubric: Rubric | None) -> JudgePrompt:
        own = self._overrides.get(granularity)
        if own is not None and ("rubric" in own.placeholders) == (rubric is not None):
            return own
        measure: Measure = (
            "checkpoints" if rubric is not None else "reference" if self.shows_reference(problem) else "noref"
        )
        return shipped_prompt(
            problem.domain, granularity, measure, self._config.prompt_order, self._config.shipped_prompts
        )

    def _new_frame(self, prompt: JudgePrompt, statement: str, reference: str | None, rubric: Rubric | None):
        rubric_text = rubric.text if rubric is not None else ""
        return prompt.frame(statement, reference or "", rubric_text, self.guard(prompt.tags))

    def _new_asked_frame(
        self, problem: str, granularity: Granularity, prompt: JudgePrompt, rubric: Rubric | None, frame: PromptFrame
    ) -> bytes:
        messages = [
            {"role": role, "content": list(pieces) if len(pieces) > 1 else pieces[0]} for role, pieces in frame.parts
        ]
        marks = None if rubric is None else json.loads(rubric.to_json())
        what = {"problem": problem, "unit": granularity, "prompt": prompt.version, "rubric": marks}
        return json.dumps({**what, "messages": messages, **self._identity}, separators=(",", ":")).encode()


def _overrides(config: JudgeConfig) -> dict[Granularity, JudgePrompt]:
    """Load the prompts that the config names."""
    names: dict[Granularity, str | None] = {
        "trace": config.prompt,
        "prefix": config.prefix_prompt,
        "segment": config.segment_prompt,
    }
    return {
        granularity: load_prompt(name, config.prompt_order) for granularity, name in names.items() if name is not None
    }
