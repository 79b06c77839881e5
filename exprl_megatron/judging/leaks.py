"""Checks that no reference reaches the policy.

There are two checks. Word n-grams: a request to the policy must not share an n-gram with its problem's reference that
the problem's statement does not have. Canaries: a string planted into the references must not occur in any request or
trace. Messages contain only positions and lengths, since they are logged.
"""

import re
import threading
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from exprl_megatron.config.problems import LeakGuardConfig
from exprl_megatron.errors import RunStopped, UserError
from exprl_megatron.problems.problem import Problem

MIN_WORDS = 4
"""A reference with fewer words is not checked: "x = 4" occurs by chance. One shorter than n words is checked whole."""

MIN_CANARY_LENGTH = 8
"""In characters without blanks; a shorter canary occurs by chance."""

# In scripts without blanks each character is a word. Elsewhere words are letters and digits.
_UNSPACED = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word of an n-gram loses its bits


@dataclass(frozen=True)
class Overlap:
    """The n-grams that a text shares with a reference, without those of the problem's statement."""

    matches: int
    """Number of positions in the text where a shared n-gram begins."""
    first_word: int
    """The first word, counted from 1, of a shared n-gram; 0 where there is none."""
    last_word: int
    """The last word of a shared n-gram."""
    ngram_words: int
    """Words in an n-gram: the config's number, or all words of a shorter reference."""
    coverage: float
    """Share of the reference's n-grams, without those of the statement, that occur in the text."""


NO_OVERLAP = Overlap(0, 0, 0, 0, 0.0)


def check_canary(canary: str) -> None:
    """Check the length of a canary.

    Raises:
        UserError: `canary` is too short.
    """
    if len(_squeezed(canary)) < MIN_CANARY_LENGTH:
        raise UserError(f"The canary {canary!r} occurs by chance; use one of at least {MIN_CANARY_LENGTH} characters.")


class LeakGuard:
    """Checks texts against the references of `problems`; safe for use by several threads.

    The hashed n-grams of a reference are built when its problem is first checked. Of problems that share an id, as in
    two files of one run, all references and all statements count.

    Raises:
        UserError: the canary is too short.
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
        """Check a request to the policy; `text` is the whole prompt under its chat template.

        Raises:
            RunStopped: the request contains an n-gram of the reference, or the canary.
            KeyError: the guard does not know the problem.
        """
        overlap = self.overlap(problem_id, text)
        if overlap.matches:
            raise RunStopped(
                f"Leak guard: a request to the policy for problem {problem_id} shares {overlap.matches} runs of "
                f"{overlap.ngram_words} words (within its words {overlap.first_word} to {overlap.last_word}) with the "
                "reference that its statement does not have, and leak_guard allows none; check prompt.system, "
                "prompt.user and the problem's record, or raise leak_guard.ngram_words where it is a common phrase."
            )
        if self.has_canary(text):
            raise RunStopped(
                f"Leak guard: a request to the policy for problem {problem_id} contains leak_guard.canary; check "
                "prompt.system, prompt.user and the problem's record."
            )

    def check_custom_prompt(self, problem_id: str, text: str) -> None:
        """Check a prompt that the user's code wrote: it must not contain the reference of any problem.

        N-grams of the statement of `problem_id` are not leaks of other problems.

        Raises:
            RunStopped: the prompt contains an n-gram of a reference, or the canary.
            KeyError: the guard does not know the problem.
        """
        self.check_request(problem_id, text)
        words = _hashed_words(text)
        statements = [_hashed_words(problem.statement) for problem in self._problems[problem_id]]
        for n, hidden in self._all_hidden().items():
            shown = np.concatenate([_ngrams(statement, n) for statement in statements])
            found = np.setdiff1d(_ngrams(words, n), shown)
            if not _is_in(hidden, found).any():
                continue
            other = next(id for id in self._problems if self._hides(id, n, found))
            raise RunStopped(
                f"Leak guard: a request to the policy for problem {problem_id} shares a run of {n} words with the "
                f"reference of problem {other}, and leak_guard allows none; check what the stage's code puts into "
                "its prompts, or raise leak_guard.ngram_words where it is a common phrase."
            )

    def _hides(self, problem_id: str, n: int, ngrams: np.ndarray) -> bool:
        return any(n == own and _is_in(hidden, ngrams).any() for own, hidden in self._references(problem_id))

    def _all_hidden(self) -> dict[int, np.ndarray]:
        """Return the n-grams of every reference by n, uint64 [n-grams], sorted; built once, 8 bytes each."""
        with self._lock:
            if self._of_all is None:
                # Arrays of each problem, to be joined later, would need two or three times the memory.
                found: defaultdict[int, bytearray] = defaultdict(bytearray)
                for problem_id in self._problems:
                    for n, hidden in self._hidden_of(problem_id):
                        found[n] += hidden.tobytes()
                self._of_all = {n: np.frombuffer(ngrams, np.uint64) for n, ngrams in found.items()}
                for ngrams in self._of_all.values():
                    ngrams.sort()
            return self._of_all

    @property
    def checks_traces(self) -> bool:
        """Whether there is a canary, for which `check_trace` searches."""
        return self._canary is not None

    def check_trace(self, problem_id: str, text: str) -> None:
        """Check a trace of the policy.

        Raises:
            RunStopped: the trace contains the canary.
        """
        if self.has_canary(text):
            raise RunStopped(
                f"Leak guard: a trace of problem {problem_id} contains leak_guard.canary, so the policy has seen "
                "references; check its training data (SFT on references or distillation teaches it the canary too)."
            )

    def has_canary(self, text: str) -> bool:
        """Return whether the canary is in `text`, regardless of case and blanks; False without a canary."""
        return self._canary is not None and self._canary in _squeezed(text)

    def is_guarded(self, problem_id: str) -> bool:
        """Return whether a reference of the problem has n-grams to search for.

        Raises:
            KeyError: the guard does not know the problem.
        """
        return bool(self._references(problem_id))

    def overlap(self, problem_id: str, text: str) -> Overlap:
        """Return what `text` shares with the problem's reference; of several references, the largest overlap.

        Raises:
            KeyError: the guard does not know the problem.
        """
        words = _hashed_words(text)
        found = [_overlap(words, hidden, n) for n, hidden in self._references(problem_id)]
        return max(found, key=lambda overlap: overlap.matches, default=NO_OVERLAP)

    def _references(self, problem_id: str) -> list[tuple[int, np.ndarray]]:
        """Return (n, hashes of the n-grams that no statement has) of each reference that has such n-grams."""
        with self._lock:
            if problem_id not in self._hidden:
                self._hidden[problem_id] = self._hidden_of(problem_id)
            return self._hidden[problem_id]

    def _hidden_of(self, problem_id: str) -> list[tuple[int, np.ndarray]]:
        problems = self._problems[problem_id]
        statements = [_hashed_words(statement) for statement in {problem.statement for problem in problems}]
        texts = {problem.reference.for_judge() for problem in problems if problem.reference is not None}
        # A planted canary is not part of the solution: a short solution is searched for without it too.
        solutions = [text.replace(self._config.canary or "", "") for text in sorted(texts)]
        hidden = [_hidden(_hashed_words(text), statements, self._config.ngram_words) for text in solutions]
        return [(n, ngrams) for n, ngrams in hidden if len(ngrams)]


def _hidden(reference: np.ndarray, statements: list[np.ndarray], ngram_words: int) -> tuple[int, np.ndarray]:
    """Return n and the hashes to search for, uint64 [n-grams], sorted and unique."""
    n = min(ngram_words, len(reference))
    if n < min(MIN_WORDS, ngram_words):
        return n, reference[:0]
    return n, np.setdiff1d(_ngrams(reference, n), np.concatenate([_ngrams(words, n) for words in statements]))


def _overlap(words: np.ndarray, hidden: np.ndarray, n: int) -> Overlap:
    """Compare the words of a text, uint64 [words], with `hidden`, uint64 [n-grams], sorted and not empty."""
    ngrams = _ngrams(words, n)
    places = np.flatnonzero(_is_in(hidden, ngrams))
    if not len(places):
        return NO_OVERLAP
    reproduced = len(np.unique(ngrams[places])) / len(hidden)
    return Overlap(len(places), int(places[0]) + 1, int(places[-1]) + n, n, reproduced)


def _is_in(hidden: np.ndarray, ngrams: np.ndarray) -> np.ndarray:
    """Return which of `ngrams` are in `hidden`, bool [n-grams]; np.isin would sort `hidden`, sorted and not empty."""
    return hidden[np.minimum(np.searchsorted(hidden, ngrams), len(hidden) - 1)] == ngrams


@lru_cache(maxsize=2)  # the traces of a group share their request, and a trace is compared more than once
def _hashed_words(text: str) -> np.ndarray:
    """Hash the words to uint64 [words], regardless of case, blanks and punctuation; the hashes differ by process."""
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)


def _ngrams(words: np.ndarray, n: int) -> np.ndarray:
    """Hash all n-grams of `words`, uint64 [max(0, words - n + 1)]: a polynomial in the words, modulo 2**64."""
    count = max(0, len(words) - n + 1)
    hashes = np.zeros(count, np.uint64)
    for offset in range(n):
        hashes = hashes * _FACTOR + words[offset : offset + count]
    return hashes


def _squeezed(text: str) -> str:
    """Remove case and blanks, which decoding may change."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())
