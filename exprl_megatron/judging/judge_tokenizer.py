"""Tokenizes the judge's questions: common text is tokenized once, with the same ids as if each question was alone.

A question is the chat template's text around a trace or a prefix of one. The text before the trace is the same for
all traces of a problem, and a trace's prefixes are parts of the longest of them. Each text is cut where that is safe
(see token_cuts), each part is tokenized once, and a window around every cut that is not proven to be safe is tokenized
again as a check. Where no cut is safe, or a window differs, the whole question is tokenized.

Where every space after a word is proven to be a safe cut (see token_splits), each word is tokenized once.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer

from exprl_megatron.judging.prompt import PromptFrame
from exprl_megatron.judging.token_cuts import Cuts, safe_cuts
from exprl_megatron.judging.word_tokens import SPACES, WordTokens, separator_of
from exprl_megatron.utils.token_ids import TokenIds, TokenPart

_WINDOW = 32
_SHORTEST_TAIL = 512
_KEPT_FRAMES = 4096


@dataclass(frozen=True)
class _Shared:
    """The common beginning and end of all questions of a frame, up to and from a safe cut."""

    head: str
    head_ids: TokenPart
    tail: str
    tail_ids: TokenPart


@dataclass(frozen=True)
class _Joint:
    """A question: up to `cut` it equals the longest one, from there to `end` it has its own text, then the tail."""

    text: str
    cut: int
    end: int


class JudgeTokenizer:
    """Tokenizes questions under a chat template; safe for use by several threads.

    `characters` and `calls` count the characters that were tokenized and the calls of the tokenizer, `uncut` the
    questions that were tokenized as a whole because they could not be cut.

    Args:
        tokenizer: the judge's Hugging Face tokenizer.
        template_args: arguments of its chat template.
    """

    def __init__(self, tokenizer: Any, template_args: Mapping[str, Any]):
        self.tokenizer = tokenizer
        self._template_args = dict(template_args)
        self._backend = _copied(tokenizer)
        self._cuts = Cuts(()) if self._backend is None else safe_cuts(self._backend)
        self._words: WordTokens | None = None
        if self._backend is not None and SPACES in self._cuts.proven:
            self._words = WordTokens(self._encoded, separator_of(self._backend))
        self._shared: OrderedDict[PromptFrame, _Shared] = OrderedDict()
        self._lock = threading.Lock()
        self.characters = self.calls = self.uncut = 0

    def prompt_ids(self, messages: Sequence[Mapping[str, str]]) -> TokenIds:
        """Return the token ids of chat messages, with the generation prompt."""
        return TokenIds(*self._parts([self._rendered(messages)]))

    def batch_prompt_ids(self, frame: PromptFrame, traces: Sequence[str]) -> list[TokenIds]:
        """Return the token ids of this frame with each of `traces`; prefixes of the longest trace cost little."""
        texts = [self._rendered(frame.messages(trace)) for trace in traces]
        joined = self._joined(texts, self._shared_by(frame)) if self._cuts and texts else None
        if joined is None:
            self.uncut += len(texts)
            return [TokenIds(part) for part in self._parts(texts)]
        return joined

    def _joined(self, texts: Sequence[str], shared: _Shared) -> list[TokenIds] | None:
        """Return the tokens of texts that all begin and end with `shared`; None where a cut is not safe."""
        if not all(text.startswith(shared.head) and text.endswith(shared.tail) for text in texts):
            return None
        longest, first = max(texts, key=len), len(shared.head)
        joints = [self._joint(text, longest, first, len(shared.tail)) for text in texts]
        cuts = sorted({first, *(joint.cut for joint in joints)})
        pieces = [longest[start:end] for start, end in pairwise(cuts)]
        parts = self._parts([*pieces, *(joint.text[joint.cut : joint.end] for joint in joints)])
        if not self._windows_agree(joints, cuts, longest, shared):
            return None
        known, own = parts[: len(pieces)], parts[len(pieces) :]
        return [
            TokenIds(shared.head_ids, *known[: cuts.index(joint.cut)], part, shared.tail_ids)
            for joint, part in zip(joints, own, strict=True)
        ]

    def _joint(self, text: str, longest: str, first: int, tail: int) -> _Joint:
        end = len(text) - tail
        if text is longest:
            # It is cut where the last of the others is cut, so its remainder is as short as theirs.
            return _Joint(text, self._cuts.last(text, first, end) or first, end)
        common = end if text[:end] == longest[:end] else min(common_prefix(text, longest), end)
        return _Joint(text, self._cuts.last(text, first, common) or first, end)

    def _windows_agree(self, joints: Sequence[_Joint], cuts: Sequence[int], longest: str, shared: _Shared) -> bool:
        """Return whether the tokens around each cut that is not proven are those of its two sides."""
        places = [(longest, cut) for cut in cuts] + [(joint.text, joint.cut) for joint in joints]
        if shared.tail:
            places += [(joint.text, joint.end) for joint in joints]
        sides = dict.fromkeys(
            (text[max(0, cut - _WINDOW) : cut], text[cut : cut + _WINDOW])
            for text, cut in places
            if cut and not self._cuts.is_proven(text, cut)
        )
        if not sides:
            return True
        encoded = iter(self._encoded([part for left, right in sides for part in (left, right, left + right)]))
        return all(left + right == both for left, right, both in zip(encoded, encoded, encoded, strict=True))

    def _shared_by(self, frame: PromptFrame) -> _Shared:
        with self._lock:
            if (known := self._shared.get(frame)) is not None:
                self._shared.move_to_end(frame)
                return known
        one, other = (self._rendered(frame.messages(text)) for text in ("a b", "c d"))
        cut = self._cuts.last(one, 0, common_prefix(one, other)) or 0
        common = common_prefix(one[cut:][::-1], other[cut:][::-1])
        behind = self._cuts.first(one, len(one) - common) if common > _SHORTEST_TAIL else None
        head, tail = one[:cut], one[behind:] if behind is not None else ""
        head_ids, tail_ids = self._parts([head, tail])
        shared = _Shared(head, head_ids, tail, tail_ids)
        with self._lock:
            self._shared[frame] = shared
            if len(self._shared) > _KEPT_FRAMES:
                self._shared.popitem(last=False)
        return shared

    def _rendered(self, messages: Sequence[Mapping[str, str]]) -> str:
        return self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False, **self._template_args
        )

    def _parts(self, texts: Sequence[str]) -> list[TokenPart]:
        if self._words is not None:
            return self._words.parts(texts)
        return [TokenPart.of(ids) for ids in self._encoded(texts)]

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, tokenized by itself."""
        self.calls += 1
        self.characters += sum(map(len, texts))
        if self._backend is None:
            with self._lock:  # such a tokenizer serves one thread at a time
                return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]


def common_prefix(one: str, other: str) -> int:
    """Return the length of the common prefix, in characters."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _copied(tokenizer: Any) -> Tokenizer | None:
    """Return a copy of the fast tokenizer in `tokenizer`, since padding and truncation change the original."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_padding()
    copy.no_truncation()
    copy.encode_special_tokens = tokenizer.split_special_tokens
    return copy
