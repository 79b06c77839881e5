"""Watches that nothing of a reference reaches the policy.

Two nets. Word n-grams: a request to the policy may share with its problem's reference no run of n words that the
problem's statement does not have itself. Canaries: a string planted into the references must turn up in no request and
in no trace. What is found is reported by place and length alone, for messages end in logs.
"""

import re
import threading
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from exprl_megatron.config.problems import LeakGuardConfig
from exprl_megatron.errors import RunStopped, UserError
from exprl_megatron.problems.problem import Problem

FEWEST_WORDS = 4
"""A shorter reference is not looked for: "x = 4" turns up by chance. One shorter than n words is looked for whole."""

SHORTEST_CANARY = 8
"""Letters and signs without blanks; a shorter one turns up by chance."""

# Scripts without blanks: each character is a word. Else letters and digits; all other characters part words.
_UNSPACED = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word of a run loses its bits


@dataclass(frozen=True)
class Overlap:
    """What a text shares with a reference beyond what the problem's statement has."""

    runs: int
    """Places in the text where a shared n-gram begins."""
    first: int
    """The first word, counted from 1, that is in one; 0 where there is none."""
    last: int
    """The last such word."""
    ngram_words: int
    """Words in an n-gram: the config's, or all of a shorter reference."""
    reproduced: float
    """Share of the reference's n-grams, without those of the statement, that the text has."""


NO_OVERLAP = Overlap(0, 0, 0, 0, 0.0)


def check_canary(canary: str) -> None:
    """Raises UserError where `canary` is too short to be one."""
    if len(_squeezed(canary)) < SHORTEST_CANARY:
        raise UserError(
            f"The canary {canary!r} turns up by chance; plant and give one of at least {SHORTEST_CANARY} characters."
        )


class LeakGuard:
    """Knows the references of `problems` as hashed n-grams, each built when its problem is first asked about.

    Of problems that share an id, as in two files of one run, all references and all statements count. For any number
    of threads at once. Raises UserError where the canary is too short to be one.
    """

    def __init__(self, config: LeakGuardConfig, problems: Iterable[Problem]):
        self._config = config
        if config.canary is not None:
            check_canary(config.canary)
        self._canary = _squeezed(config.canary) if config.canary is not None else None
        self._problems: dict[str, list[Problem]] = {}
        for problem in problems:
            self._problems.setdefault(problem.id, []).append(problem)
        self._hidden: dict[str, list[tuple[int, np.ndarray]]] = {}
        self._of_all: dict[int, np.ndarray] | None = None
        self._lock = threading.Lock()

    def check_request(self, problem_id: str, text: str) -> None:
        """Raise RunStopped where a request to the policy, `text` with its chat template, holds what it must not.

        Raises KeyError for a problem that the guard was not given.
        """
        overlap = self.overlap(problem_id, text)
        if overlap.runs:
            raise RunStopped(
                f"Leak guard: a request to the policy for problem {problem_id} shares {overlap.runs} runs of "
                f"{overlap.ngram_words} words (within its words {overlap.first} to {overlap.last}) with the reference "
                "that its statement does not have, and leak_guard allows none; see what prompt.system, prompt.user and "
                "the problem's record put there, or raise leak_guard.ngram_words where it is a common phrase."
            )
        if self.has_canary(text):
            raise RunStopped(
                f"Leak guard: a request to the policy for problem {problem_id} holds leak_guard.canary; see what "
                "prompt.system, prompt.user and the problem's record put there."
            )

    def check_own_text(self, problem_id: str, text: str) -> None:
        """As `check_request`, of a prompt that the user's own code wrote: it may hold no problem's reference.

        What the statement of `problem_id` has itself is no leak of another problem.
        """
        self.check_request(problem_id, text)
        words = _hashed_words(text)
        statements = [_hashed_words(problem.statement) for problem in self._problems[problem_id]]
        for n, hidden in self._all_hidden().items():
            shown = np.concatenate([_ngrams(statement, n) for statement in statements])
            found = np.setdiff1d(_ngrams(words, n), shown)
            if not np.isin(found, hidden).any():
                continue
            other = next(id for id in self._problems if self._hides(id, n, found))
            raise RunStopped(
                f"Leak guard: a request to the policy for problem {problem_id} shares a run of {n} words with the "
                f"reference of problem {other}, and leak_guard allows none; see what the stage's own code puts into "
                "its prompts, or raise leak_guard.ngram_words where it is a common phrase."
            )

    def _hides(self, problem_id: str, n: int, ngrams: np.ndarray) -> bool:
        return any(n == own and np.isin(ngrams, hidden).any() for own, hidden in self._references(problem_id))

    def _all_hidden(self) -> dict[int, np.ndarray]:
        """The n-grams of every reference, by n; made once."""
        if self._of_all is None:
            found: dict[int, list[np.ndarray]] = {}
            for problem_id in self._problems:
                for n, hidden in self._references(problem_id):
                    found.setdefault(n, []).append(hidden)
            self._of_all = {n: np.unique(np.concatenate(ngrams)) for n, ngrams in found.items()}
        return self._of_all

    @property
    def watches_traces(self) -> bool:
        """Whether `check_trace` looks for anything."""
        return self._canary is not None

    def check_trace(self, problem_id: str, text: str) -> None:
        """Raise RunStopped where a trace of the policy holds the canary."""
        if self.has_canary(text):
            raise RunStopped(
                f"Leak guard: a trace of problem {problem_id} holds leak_guard.canary, so the policy has seen "
                "references; see what it was trained on (SFT on references or distillation teaches it the canary too)."
            )

    def has_canary(self, text: str) -> bool:
        """Whether the canary is in `text`, whatever the case and the blanks; False without a canary."""
        return self._canary is not None and self._canary in _squeezed(text)

    def guarded(self, problem_id: str) -> bool:
        """Whether a reference of the problem has anything to look for; KeyError for an unknown problem."""
        return bool(self._references(problem_id))

    def overlap(self, problem_id: str, text: str) -> Overlap:
        """What `text` shares with the problem's reference (the most, of several); KeyError for an unknown problem."""
        words = _hashed_words(text)
        found = [_overlap(words, hidden, n) for n, hidden in self._references(problem_id)]
        return max(found, key=lambda overlap: overlap.runs, default=NO_OVERLAP)

    def _references(self, problem_id: str) -> list[tuple[int, np.ndarray]]:
        """(n, hashes of its n-grams that no statement has) of each reference that has any."""
        with self._lock:
            if problem_id not in self._hidden:
                self._hidden[problem_id] = self._hidden_of(problem_id)
            return self._hidden[problem_id]

    def _hidden_of(self, problem_id: str) -> list[tuple[int, np.ndarray]]:
        problems = self._problems[problem_id]
        statements = [_hashed_words(statement) for statement in {problem.statement for problem in problems}]
        texts = {problem.reference.for_judge() for problem in problems if problem.reference is not None}
        # A planted canary is no part of the solution: a short one has to be found without it too.
        solutions = [text.replace(self._config.canary or "", "") for text in sorted(texts)]
        hidden = [_hidden(_hashed_words(text), statements, self._config.ngram_words) for text in solutions]
        return [(n, ngrams) for n, ngrams in hidden if len(ngrams)]


def _hidden(reference: np.ndarray, statements: list[np.ndarray], ngram_words: int) -> tuple[int, np.ndarray]:
    """n and the hashes to look for, sorted, each once."""
    n = min(ngram_words, len(reference))
    if n < min(FEWEST_WORDS, ngram_words):
        return n, reference[:0]
    return n, np.setdiff1d(_ngrams(reference, n), np.concatenate([_ngrams(words, n) for words in statements]))


def _overlap(words: np.ndarray, hidden: np.ndarray, n: int) -> Overlap:
    """`hidden` is sorted and not empty."""
    ngrams = _ngrams(words, n)
    nearest = hidden[np.minimum(np.searchsorted(hidden, ngrams), len(hidden) - 1)]
    places = np.flatnonzero(nearest == ngrams)
    if not len(places):
        return NO_OVERLAP
    reproduced = len(np.unique(ngrams[places])) / len(hidden)
    return Overlap(len(places), int(places[0]) + 1, int(places[-1]) + n, n, reproduced)


@lru_cache(maxsize=2)  # the traces of a group share their request, and a trace is compared more than once
def _hashed_words(text: str) -> np.ndarray:
    """64-bit hashes of the words, uint64 [words], alike for any case, blanks and punctuation; for this process only."""
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)


def _ngrams(words: np.ndarray, n: int) -> np.ndarray:
    """Hashes of all runs of `n` words, uint64 [max(0, words - n + 1)]: a polynomial in the words, modulo 2**64."""
    count = max(0, len(words) - n + 1)
    hashes = np.zeros(count, np.uint64)
    for offset in range(n):
        hashes = hashes * _FACTOR + words[offset : offset + count]
    return hashes


def _squeezed(text: str) -> str:
    """Without case and blanks, which decoding may change."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())
