"""Verification of multiple-choice answers by the letter that a trace states in a box or in a sentence."""

import re
import string
from collections.abc import Iterator, Sequence

from exprl_megatron.judging.judgement import Abstained, Judgement, Scored
from exprl_megatron.rewards.extraction import last_box_group
from exprl_megatron.utils.thinking import mask_thinking

_NOUN = (
    r"(?:(?:answer|ans\.?|antwort|réponse|respuesta|risposta|resposta|ответ|答案|正解)"
    r"(?:\s+(?:choice|option|key|letter))?"
    r"|(?:correct|right|best)\s+(?:option|choice|letter|one|statement)|(?:my|final)\s+(?:choice|pick|selection))"
)
_VERB = r"(?:is|must be|would be|should be|has to be|ist|est|es|è|é|是|为)"
# "The answer is C", "Answer: C", "the answer to this must then be C", "Answer C", "## Answer\n\nC".
_STATEMENT = re.compile(
    rf"(?<![A-Za-z0-9-]){_NOUN}"
    r"(?P<middle>[*_\"')]{0,4}"
    rf"(?:\s*(?:[:：=]|→|->|—|–|-(?=\s))|(?:[^.!?\n:：=]{{0,60}}?(?<!\w)|\s*){_VERB}(?!\w)[*_]*\s*[:：]?)"
    r"|[*_:]{0,4}[ \t]*\n|[*_]{0,4}[ \t]+(?=[(\[*\"`]{0,4}[A-Z][)\]*\"`.,]{0,4}(?:\s|$)))"
    r"(?=[\s*_#>-]{0,40}(?P<rest>[^\n]{0,1000}))",
    re.IGNORECASE,
)
# "C is correct", "option (C) is the right answer"; "I choose C", "I think it's C", "Therefore, C."
_SUBJECT = re.compile(
    r"(?<![\w'’])[*_(\"`\[]{0,4}(?P<rest>[A-Za-z])[*_)\"`\].:]{0,4}\s+(?:is|must be|would be|seems)\s+"
    r"(?:therefore |thus |clearly |indeed )?(?:the )?(?:only )?(?:(?:correct|right|best)\b|answer\b)"
)
_CHOSEN = re.compile(
    r"(?:\b(?:choose|select|pick|go(?:ing)? with|opt for|settle on|that leaves|leaves us with|leaving|it is|it's"
    r"|it must be|that's|that is)|(?:^|[.!?\n])[ \t*_]{0,8}(?:therefore|thus|hence|so|conclusion)[,:]?)\s{1,4}"
    r"(?P<rest>[^\n]{0,1000})",
    re.IGNORECASE,
)
_HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*(?P<rest>[^\n]{0,1000})")
_MOST_STATEMENTS = 100
"""Largest number of statements that are read, from the last one on; traces that repeat themselves have thousands."""
_UNDECIDED = re.compile(
    r"\b(?:not|n't|cannot|never|neither|nor|wrong|incorrect|false|eliminated?|unlikely|hardly|if|whether|unless|could|may|might)\b|n['’]t\b",
    re.IGNORECASE,
)
_HYPOTHESIS = re.compile(
    r"\b(?:if|whether|suppose|supposing|unless|assuming|assume|(?:might|may|could|would|people|students|some)\s+"
    r"(?:think|say|guess|believe|assume|expect))\s+(?:that\s+)?(?:the|my|this|its)?\s*(?:\w+\s+)?$",
    re.IGNORECASE,
)
_OF_ANOTHER_KIND = re.compile(
    r"(?:\b(?:wrong|worst|incorrect|false|bad|previous|earlier|initial|first|tempting|other|not|never|cannot"
    r"|rather than)|n['’]t)\s+(?:\w+\s+)?$",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
_QUESTION = re.compile(r"[^.!?\n]{0,40}\?")
_LETTER = r"(?:[(\[{<【「『⟨]\s*(?P<wrapped>[A-Za-z])\s*[)\]}>】」』⟩]|(?P<bare>[A-Za-z])(?![\w'’]|\s*[=^+*/<>]))"
_SKIPPED = re.compile(
    r"(?:\s|(?:therefore|thus|then|clearly|indeed|definitely|certainly|probably|most likely|likely|simply|just"
    r"|actually|hence|so|now|given by|either)\b,?"
    r"|(?:the )?(?:correct |right |final )?(?:option|choice|letter|answer)s?\b:?)+",
    re.IGNORECASE,
)
_FIRST = re.compile(_LETTER)
_NAMED = re.compile(r"^(?:the )?(?:option|choice|letter)\s+", re.IGNORECASE)
_ALONE = re.compile(_LETTER + r"\s*[).:]*")
_SEPARATED = re.compile(r"\s*(?:,|;|/|&|\+|\band\b|\bor\b)\s*(?:and\b|or\b)?\s*" + _LETTER)
_RUN = re.compile(r"[A-Z]{2,}(?!\w)")
# "A" and "I" are words too: letters are followed by the end, a full stop, or one of these.
_AFTER_LETTER = re.compile(
    r"\s*(?:$|[^\w\s'’]|[\s]+(?:because|since|as|for|which|is|was|by|given|due|based|from|in|on|with|at|after|when|where"
    r"|if|and|or|but|not|only|here|instead|according|via|through|under|over|per|thanks|so|then|while|although|though"
    r"|however|we|rather|too|indeed|again|therefore|thus|hence)\b)"
)
_WRAPPED = re.compile(
    r"\\(?:boxed|text|textbf|textit|textrm|mathrm|mathbf|mathsf|mathit|rm|bf|boldsymbol|bm|underline)\s*\{([^{}]*)\}"
)
_MARKUP = re.compile(
    r"[$*`\"“”„«»‘’]|\\[()\[\],;:! ]"
    r"|\\(?:left|right|big|quad|displaystyle|bf|rm)\b|(?<!\w)'|'(?!\w)|</?(?:\w{2,}|[a-z])>|~"
)
_TAGS = re.compile(r"<\|[^<>|\n]{1,40}\|>|</?(?:s|answer|response|solution)>")
"""Control tokens, and tags around the answer."""


def grade_choice(answer: str, choices: Sequence[str], trace_text: str) -> Judgement:
    r"""Score 1.0 where the last statement of the trace names the choice `answer` (a letter) and no other, else 0.0.

    Statements are `\boxed{C}`, "Answer: C", "the answer is (C)", a heading "Answer" above the letter, `#### C` and a
    last line that is the letter; only where there is none of these, "C is correct" or "so I choose C". Instead of the
    letter they may contain the text of exactly one of `choices`. A statement without a letter or a choice is ignored,
    also in a box, and so are thinking blocks. Letters beyond the choices, and several letters together, are wrong.
    Without `choices` (they may be in the question) every letter of the alphabet is one.
    Abstains with `verifier-error` where `answer` is not a choice.
    """
    letters = string.ascii_uppercase[: len(choices) or None]
    right = answer.strip(" ().").upper()
    if len(right) != 1 or right not in letters:
        return Abstained("verifier-error", f"the right answer {answer!r} is none of the letters {letters}")
    stated = _last_statement(_TAGS.sub(" ", mask_thinking(trace_text)), choices)
    return Scored(0.0, "no answer") if stated is None else Scored(float(stated == right), stated)


def _last_statement(text: str, choices: Sequence[str]) -> str | None:
    """Return the letter stated last, whether or not a choice has it, or several letters as written."""
    for places in (_sure(text, choices), _last_line(text, choices), _headings(text), _unsure(text)):
        found = None
        for place, fragment in places:
            letter = _letter(fragment, choices) or _letter(_SENTENCE_END.split(fragment)[0], choices)
            if letter is not None:
                found = max(found or (-1, ""), (place, letter))
        if found is not None:
            return found[1]
    return None


def _sure(text: str, choices: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Return start and letter of the last statement of each reliable kind that has a letter."""
    for statement in reversed(list(_STATEMENT.finditer(text))[-_MOST_STATEMENTS:]):
        before = text[max(0, statement.start() - 60) : statement.start()]
        if _UNDECIDED.search(statement["middle"]) or _HYPOTHESIS.search(before) or _OF_ANOTHER_KIND.search(before):
            continue
        rest = statement["rest"]
        if _QUESTION.match(rest) or _UNDECIDED.match(rest.lstrip(" *_")):
            continue
        if _letter(rest, choices) or _letter(_SENTENCE_END.split(rest)[0], choices):
            yield statement.start(), rest
            break
    boxes = last_box_group(text, lambda content: _letter(content, choices) is not None)
    if boxes is not None:
        yield boxes


def _last_line(text: str, choices: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Return the last line where it is only a letter or a choice, with or without `####` before it."""
    line = text.rstrip().rpartition("\n")[2].lstrip(" #>-*_")
    if _ALONE.fullmatch(_NAMED.sub("", _plain(line))) or len(_with_text(_without_letter(line), choices)) == 1:
        yield 0, line


def _headings(text: str) -> Iterator[tuple[int, str]]:
    """Yield the text after the last `####`, which may be a heading and is used only where no better one exists."""
    for heading in list(_HASHES.finditer(text))[-1:]:
        yield heading.start(), heading["rest"]


def _unsure(text: str) -> Iterator[tuple[int, str]]:
    """Yield sentences from which a letter is taken where no reliable statement has one."""
    for pattern in (_SUBJECT, _CHOSEN):
        for statement in list(pattern.finditer(text))[-_MOST_STATEMENTS:]:
            before = text[max(0, statement.start() - 60) : statement.start()]
            if not _UNDECIDED.match(statement["rest"]) and not _OF_ANOTHER_KIND.search(before):
                yield statement.start(), statement["rest"]


def _letter(fragment: str, choices: Sequence[str]) -> str | None:
    """Return the letter that begins the fragment, or the letter of the choice that it states; None without either.

    Several letters, or a letter with the text of another choice, are returned as written.
    """
    fragment = _plain(fragment)
    if skipped := _SKIPPED.match(fragment):
        fragment = fragment[skipped.end() :]
    letters = string.ascii_uppercase[: len(choices) or None]
    same = _with_text(fragment, choices)
    alone = _ALONE.fullmatch(fragment)
    if alone:
        letter = alone["wrapped"] or alone["bare"]
        if letter.upper() in letters or (len(same) != 1 and letter.isupper()):
            return letter.upper()
    if len(same) == 1:
        return same[0]
    first = _FIRST.match(fragment)
    if first is None:
        run = _RUN.match(fragment)
        return (
            run[0]
            if run and set(run[0]) <= set(letters) and run[0] == fragment.rstrip(".")
            else _beginning(fragment, choices)
        )
    return _followed(fragment, first, letters, choices)


def _followed(fragment: str, first: re.Match, letters: str, choices: Sequence[str]) -> str | None:
    """Return what a fragment states that starts with a letter and continues."""
    letter, rest = first["wrapped"] or first["bare"], fragment[first.end() :]
    end = first.end()
    while (several := _SEPARATED.match(fragment, end)) and _is_letter(several, fragment, letters):
        end = several.end()
    if end > first.end():
        return fragment[:end]
    if not _is_letter(first, fragment, letters):
        return None
    others = _with_text(rest.lstrip(" .:)-–—"), choices) or _with_text(
        _SENTENCE_END.split(rest.lstrip(" .:)-–—"))[0], choices
    )
    return letter.upper() if not others or letter.upper() in others else fragment


def _is_letter(match: re.Match, fragment: str, letters: str) -> bool:
    """Return whether a letter names a choice and is not a word ("a city", "I think"), a name or a unit."""
    letter = match["wrapped"] or match["bare"]
    if letter.islower() and letter.upper() not in letters:
        return False
    doubtful = match["bare"] and (letter in "AI" or letter.islower())
    return not doubtful or _AFTER_LETTER.match(fragment[match.end() :]) is not None


def _beginning(fragment: str, choices: Sequence[str]) -> str | None:
    """Return the letter of the only choice with whose text the fragment starts, where a clause ends after it."""
    text = _normalized(fragment)
    lettered = zip(string.ascii_uppercase, map(_normalized, choices), strict=False)
    found = [(len(choice), letter) for letter, choice in lettered if choice and _begins(text, choice)]
    longest = [letter for length, letter in found if length == max(found)[0]]
    return longest[0] if len(longest) == 1 else None


def _begins(text: str, choice: str) -> bool:
    return (
        text.startswith(choice)
        and re.match(r"\s*(?:[,;(—–]|\s(?:because|since|as|which|by)\b)", text[len(choice) :]) is not None
    )


def _without_letter(text: str) -> str:
    """Return the text of a choice without its letter: `Paris` of `C. Paris`."""
    first = _ALONE.match(_plain(text))
    return _plain(text)[first.end() :].lstrip(" .:)-–—") if first else text


def _with_text(text: str, choices: Sequence[str]) -> list[str]:
    """Return the letters of the choices with this text."""
    wanted = _normalized(text)
    lettered = zip(string.ascii_uppercase, choices, strict=False)
    return [letter for letter, choice in lettered if _normalized(choice) == wanted]


def _normalized(text: str) -> str:
    return " ".join(_plain(text).casefold().split())


def _plain(text: str) -> str:
    """Remove markup and the final full stop."""
    before = None
    while before != text:
        before, text = text, _WRAPPED.sub(r"\1", text)
    return _MARKUP.sub("", text).strip().strip("_").rstrip(".,;!").rstrip()
