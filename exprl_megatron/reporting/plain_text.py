"""Text that models, judges and problem files contain, for a terminal or a page."""

from rich.text import Text

_BIDIRECTIONAL = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
"""Reorder what is displayed around them."""
_SHOWN_AS = (
    {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
    | dict.fromkeys((*range(127, 160), 0x2028, 0x2029), "\ufffd")
    | dict.fromkeys(_BIDIRECTIONAL, "\ufffd")
)


def escaped(text: str) -> str:
    """Return `text` with pictures of its control characters, and a sign for each character that reorders others or that
    cannot be encoded; as long as `text`."""
    return text.encode("utf-8", "replace").decode().translate(_SHOWN_AS)


def escaped_text(text: str, style: str = "") -> Text:
    """Return `text` as `escaped` has it, without markup."""
    return Text(escaped(text), style)


def escaped_line(text: str, style: str = "") -> Text:
    """Return `text` escaped, on one line: line breaks and tabs are shown as pictures too."""
    return escaped_text(text.replace("\n", "\u240a").replace("\t", "\u2409"), style)
