"""Cuts a response into segments of its sampled token ids, and builds the texts that a judge reads.

A boundary is found in the decoded text and moved to the start of the token that contains its first character. Where
that token also contains text before the boundary (`\\n\\n###` may be one token), all of it belongs to the segment that
it opens. Special tokens have no text: the end-of-sequence token belongs to the last segment.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import numpy as np

from exprl_megatron.config.segments import SegmentsConfig
from exprl_megatron.judging.judgement import Granularity
from exprl_megatron.judging.token_text import TokenText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_RELEASED_WINDOW = 10
_BLANK_LINES = re.compile(r"\n[^\S\n]*\n\s*")
_SENTENCE_ENDS = re.compile(r"(?:[.!?]+[\"'”’)\]]*\s|[。！？]+[\"'”’）」]*|\n)\s*")


def segments_and_texts(
    token_ids: Sequence[int] | np.ndarray,
    tokenizer: "PreTrainedTokenizerBase",
    config: SegmentsConfig,
    granularity: Granularity,
) -> tuple[tuple[tuple[int, int], ...], tuple[str, ...]]:
    """Return the results of `split_segments` and `shown_texts`; the tokens are decoded once."""
    text = TokenText(token_ids, tokenizer)
    spans = split_segments(token_ids, tokenizer, config, text)
    return spans, shown_texts(token_ids, spans, tokenizer, granularity, text)


def split_segments(
    token_ids: Sequence[int] | np.ndarray,
    tokenizer: "PreTrainedTokenizerBase",
    config: SegmentsConfig,
    text: TokenText | None = None,
) -> tuple[tuple[int, int], ...]:
    """Split a response into half-open token spans, in order, that cover it exactly once.

    Blank text is never a segment of its own. A segment shorter than `min_tokens` is joined to the next one (so that a
    lone heading stays with its text), and the last one to the one before; segments above `max_segments` are joined to
    the last. The splitter `released` follows the released code exactly, including short and blank segments.

    Args:
        token_ids: the sampled token ids [tokens].
        tokenizer: the policy's tokenizer.
        config: the splitter and its bounds.
        text: the decoded text of the tokens, where the caller has it.

    Returns:
        The spans (first token, one past the last); none is empty, and there are none for no tokens.
    """
    if len(token_ids) == 0:
        return ()
    if config.splitter == "released":
        bounds = _released_bounds(np.asarray(token_ids).tolist(), tokenizer, config.delimiter)
    else:
        text = text or TokenText(token_ids, tokenizer)
        tokens = (text.token_at(character) for character in _openings(text.text, config))
        bounds = _joined(tokens, len(token_ids), config)
    return tuple(pairwise([0, *bounds, len(token_ids)]))


def shown_texts(
    token_ids: Sequence[int] | np.ndarray,
    spans: Sequence[tuple[int, int]],
    tokenizer: "PreTrainedTokenizerBase",
    granularity: Granularity,
    text: TokenText | None = None,
) -> tuple[str, ...]:
    """Build the text that the judge reads for each span: the segment or the prefix; for `trace` the text of all tokens.

    Special tokens are left out. The concatenated segments are the decoded response, and a prefix is the concatenation
    of its segments: a space that the decoder puts between two words starts the second one's segment, and a character
    that the end of a span cuts belongs to the next span. `text` is the text of the tokens, where it is known.
    """
    text = text or TokenText(token_ids, tokenizer)
    if granularity == "trace":
        return (text.text,)
    ends = [0, *(text.characters_before(end) for _, end in spans)]
    segments = [text.text[start:end] for start, end in pairwise(ends)]
    return tuple(segments if granularity == "segment" else accumulate(segments))


def _openings(text: str, config: SegmentsConfig) -> list[int]:
    """Return the positions in `text` where a segment begins, without its start; no segment is blank."""
    delimiter = re.escape(config.delimiter)
    if config.splitter == "heading":
        places = [match.start() for match in re.finditer(f"^{delimiter}", text, re.MULTILINE)]
    elif config.splitter == "delimiter":
        places = [match.start() for match in re.finditer(f"(?:{delimiter})+", text)]
    elif config.splitter == "paragraph":
        places = [match.end() for match in _BLANK_LINES.finditer(text)]
    else:
        every = config.sentences_per_segment
        places = [match.end() for match in _SENTENCE_ENDS.finditer(text)][every - 1 :: every]
    opening, last, end = [], 0, len(text.rstrip())
    for place in places:
        if place < end and text[last:place].strip():
            opening.append(place)
            last = place
    return opening


def _joined(bounds: Iterable[int], length: int, config: SegmentsConfig) -> list[int]:
    """Drop those of `bounds` (ascending token indices) that violate the minimum length or the maximum count."""
    shortest = max(config.min_tokens, 1)
    kept = [0]
    for bound in bounds:
        if bound - kept[-1] >= shortest:
            kept.append(bound)
    if length - kept[-1] < shortest:
        kept.pop()
    return kept[1 : config.max_segments]


def _released_bounds(token_ids: Sequence[int], tokenizer: "PreTrainedTokenizerBase", delimiter: str) -> list[int]:
    """Return a bound after each token where the decoded last 10 tokens, with special ones, end with the delimiter.

    The delimiter thus ends the segment before the one that it heads, and a `#` after `###` is a segment of its own.
    """
    # A token that ends in another character cannot end a segment, so its window is not decoded.
    endings = {token: tokenizer.decode([token])[-1:] for token in set(token_ids)}
    candidates = [i for i, token in enumerate(token_ids, 1) if endings[token] in (delimiter[-1], "\ufffd", "")]
    windows = ((i, token_ids[max(0, i - _RELEASED_WINDOW) : i]) for i in candidates if i < len(token_ids))
    return [i for i, window in windows if tokenizer.decode(list(window)).endswith(delimiter)]
