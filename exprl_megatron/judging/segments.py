"""Cutting a response into segments, on the token ids that were sampled, and the texts that a judge is shown.

A boundary is found in the decoded text and moved to the start of the token that holds its first character. Where
that token also holds what comes before (`\\n\\n###` may be one token), all of it belongs to the segment that it opens.
Special tokens give no text: the end-of-sequence token belongs to the last segment.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

import numpy as np
from transformers import PreTrainedTokenizerBase

from exprl_megatron.config.segments import SegmentsConfig
from exprl_megatron.judging.judgement import Granularity
from exprl_megatron.judging.token_text import TokenText

_RELEASED_WINDOW = 10
_BLANK_LINES = re.compile(r"\n[^\S\n]*\n\s*")
_SENTENCE_ENDS = re.compile(r"(?:[.!?]+[\"'”’)\]]*\s|[。！？]+[\"'”’）」]*|\n)\s*")


def segments_and_texts(
    token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, config: SegmentsConfig, granularity: Granularity
) -> tuple[tuple[tuple[int, int], ...], tuple[str, ...]]:
    """What `split_segments` and `unit_texts` return, of tokens that are decoded once."""
    text = TokenText(token_ids, tokenizer)
    spans = split_segments(token_ids, tokenizer, config, text)
    return spans, shown_texts(token_ids, spans, tokenizer, granularity, text)


def split_segments(
    token_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    config: SegmentsConfig,
    text: TokenText | None = None,
) -> tuple[tuple[int, int], ...]:
    """Half-open token spans, in order, that cover the response exactly once; none is empty, () for no tokens.

    What is blank is never a segment of its own. A segment shorter than `min_tokens` is joined to the one after it (a
    lone heading thus stays with what it heads), the last one to the one before; of more than `max_segments` the
    surplus is joined to the last. The splitter `released` follows the released code to the letter, short and blank
    segments included. `text` is that of the tokens, where it is known.
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
    token_ids: Sequence[int],
    spans: Sequence[tuple[int, int]],
    tokenizer: PreTrainedTokenizerBase,
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
    """Places in `text` at which a segment opens, other than its start; no segment is blank."""
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
    """`bounds` (ascending token indices) without those that minimum length and maximum count take away."""
    shortest = max(config.min_tokens, 1)
    kept = [0]
    for bound in bounds:
        if bound - kept[-1] >= shortest:
            kept.append(bound)
    if length - kept[-1] < shortest:
        kept.pop()
    return kept[1 : config.max_segments]


def _released_bounds(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, delimiter: str) -> list[int]:
    """After each token at which the decoded last 10 tokens, special ones included, end with the delimiter.

    The delimiter thus ends the segment before the one that it heads; a `#` after `###` makes a segment of its own.
    """
    # A token that ends in another character cannot close a segment: its window need not be decoded.
    endings = {token: tokenizer.decode([token])[-1:] for token in set(token_ids)}
    candidates = [i for i, token in enumerate(token_ids, 1) if endings[token] in (delimiter[-1], "\ufffd", "")]
    windows = ((i, token_ids[max(0, i - _RELEASED_WINDOW) : i]) for i in candidates if i < len(token_ids))
    return [i for i, window in windows if tokenizer.decode(list(window)).endswith(delimiter)]
