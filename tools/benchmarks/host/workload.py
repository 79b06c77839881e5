"""Traces of real size and shape, without a model: long-tailed lengths, log-probs as servers return them, text."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from exprl_megatron.algorithms.batch import TrainSample
from exprl_megatron.judging.judgement import Scored
from exprl_megatron.rollout.group import GradedTrace, Group, JudgedSegment
from exprl_megatron.rollout.trace import Trace

GROUP = 16
PROMPT_TOKENS = 256
SEGMENTS = 10
_VOCABULARY = 128_256
_WORDS = [
    "the",
    "of",
    "we",
    "and",
    "to",
    "that",
    "is",
    "for",
    "then",
    "so",
    "let",
    "since",
    "therefore",
    "which",
    "equals",
    "have",
    "because",
    "this",
    "can",
    "be",
    "by",
    "from",
]
_EVIDENCE = "The trace sets up the equation and follows the reference in its main steps but for a sign. " * 4
_CUT = 16384 / 6000
"""The longest trace by the mean, as in docs/scaling.md's long answers."""


@dataclass(frozen=True)
class Workload:
    """One step of `traces` traces whose mean length is `mean_tokens`."""

    traces: int
    mean_tokens: int
    model: Path = Path("build/smollm2-135m-instruct")
    """Has the tokenizer with which traces are judged; tools/prepare_smollm.py writes the default one."""

    @cached_property
    def lengths(self) -> np.ndarray:
        """[traces], int64: log-normal with sigma 0.6, cut."""
        drawn = np.random.default_rng(1).lognormal(0, 0.6, self.traces)
        drawn = np.minimum(drawn / drawn.mean(), _CUT)
        return np.maximum(8, drawn * self.mean_tokens / drawn.mean()).astype(np.int64)

    @cached_property
    def budget(self) -> int:
        """Tokens of a micro-batch: those of the 70B recipe, or the longest trace."""
        return max(8192, int(self.lengths.max()) + PROMPT_TOKENS)

    @cached_property
    def groups(self) -> list[Group]:
        """The traces, judged by segments and verified."""
        draw = np.random.default_rng(2)
        found = []
        for first in range(0, self.traces, GROUP):
            problem_id, prompt = f"problem-{first // GROUP}", ids(draw, PROMPT_TOKENS)
            lengths = self.lengths[first : first + GROUP].tolist()
            members = (graded(draw, problem_id, sample, prompt, n) for sample, n in enumerate(lengths))
            found.append(Group(problem_id, tuple(members)))
        return found

    @cached_property
    def sequences(self) -> list[TrainSample]:
        """What an update of the step learns from."""
        traces = [member.trace for group in self.groups for member in group.samples]
        return [
            TrainSample(t.prompt_ids, t.token_ids, np.broadcast_to(np.float32(0.5), len(t.token_ids)), t.log_probs)
            for t in traces
        ]


def graded(draw: np.random.Generator, problem_id: str, sample: int, prompt: np.ndarray, tokens: int) -> GradedTrace:
    """Return a trace with its judgements."""
    trace = Trace(
        problem_id,
        sample,
        prompt,
        ids(draw, tokens),
        log_probs(draw, tokens),
        text(draw, tokens),
        "stop",
        (("v3", 0, tokens),),
        PROMPT_TOKENS,
    )
    judgement = Scored(sample % 5 / 4, f"{_EVIDENCE}Score: {1 + sample % 5}", "0" * 64)
    bounds = [number * tokens // SEGMENTS for number in range(SEGMENTS + 1)]
    segments = (JudgedSegment(bounds[i], bounds[i + 1], judgement) for i in range(SEGMENTS))
    return GradedTrace(trace, judgement, tuple(segments), Scored(float(sample % 2), "42"))


def ids(draw: np.random.Generator, tokens: int) -> np.ndarray:
    """[tokens], int32: frequent ids are small, as byte-pair merges are numbered."""
    return np.minimum(draw.exponential(_VOCABULARY / 20, tokens), _VOCABULARY - 1).astype(np.int32)


def log_probs(draw: np.random.Generator, tokens: int) -> np.ndarray:
    """[tokens], float32: most near 0, some far from it."""
    scale = np.where(draw.random(tokens) < 0.6, 0.01, 0.9)
    return -(draw.exponential(1.0, tokens) * scale).astype(np.float32)


def text(draw: np.random.Generator, tokens: int) -> str:
    """About four characters a token; words in an order of its own, with numbers."""
    chosen = draw.integers(0, 2 * len(_WORDS), tokens)
    return " ".join(_WORDS[i] if i < len(_WORDS) else str(i) for i in chosen.tolist())
