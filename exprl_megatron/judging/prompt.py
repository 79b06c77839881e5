"""Judge prompts: files with a system and a user section, filled in with data that stays data."""

import re
from dataclasses import dataclass
from pathlib import Path

from exprl_megatron.errors import UserError

SHIPPED = Path(__file__).parent / "prompts"
PLACEHOLDERS = ("problem", "reference", "trace")

_SECTION = re.compile(r"^## (system|user)[ \t]*$", re.MULTILINE)
# A brace after a letter or a brace belongs to TeX (\boxed{x}, a_{n}), not to us.
_PLACEHOLDER = re.compile(r"(?<![\w}^\\])\{([a-z_]+)\}")
_TAG = re.compile(rf"<(\s*/?\s*(?:{'|'.join(PLACEHOLDERS)})\s*)>", re.IGNORECASE)


@dataclass(frozen=True)
class JudgePrompt:
    """Templates of the two messages that a judge gets; `{problem}`, `{reference}` and `{trace}` are filled in."""

    system: str | None
    user: str

    def messages(self, problem: str, reference: str, trace: str) -> list[dict[str, str]]:
        """The chat. All placeholders are filled in one pass: braces within the data are not looked at.

        Tags like `</trace>` within the data get square brackets, so that data cannot end its section.
        """
        data = {"problem": problem, "reference": reference, "trace": trace}
        data = {name: _TAG.sub(r"[\1]", text) for name, text in data.items()}
        parts = [("system", self.system), ("user", self.user)]
        return [{"role": role, "content": _filled(text, data)} for role, text in parts if text is not None]


def load_prompt(name: str) -> JudgePrompt:
    """The prompt shipped under `name` (judging/prompts), or that in the file of this path.

    A prompt file is text with the sections `## system` (optional) and `## user`. Raises UserError where
    the file is missing, has no user section, names an unknown placeholder or never shows the trace.
    """
    path = SHIPPED / f"{name}.md"
    if not path.is_file():
        path = Path(name).expanduser()
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.md")))
        raise UserError(f"There is no judge prompt {name!r}; give the path of a file or one of: {shipped}.")
    prompt = _parsed(path)
    used = set(_PLACEHOLDER.findall(f"{prompt.system or ''}\n{prompt.user}"))
    if unknown := sorted(used - set(PLACEHOLDERS)):
        raise UserError(
            f"The judge prompt {path} has the unknown placeholder {{{unknown[0]}}}; "
            f"the known ones are {', '.join(PLACEHOLDERS)}."
        )
    if "trace" not in used:
        raise UserError(f"The judge prompt {path} never shows the trace; put {{trace}} into its user section.")
    return prompt


def _parsed(path: Path) -> JudgePrompt:
    pieces = _SECTION.split(path.read_text(encoding="utf-8"))
    names, texts = pieces[1::2], [text.strip() for text in pieces[2::2]]
    sections = dict(zip(names, texts, strict=True))
    if len(names) != len(sections) or "user" not in sections or pieces[0].strip():
        raise UserError(
            f"The judge prompt {path} is not made of one section `## user` and at most one `## system`; mend it."
        )
    return JudgePrompt(sections.get("system"), sections["user"])


def _filled(template: str, data: dict[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda match: data[match[1]], template)
