"""Judge prompts: templates from files, which are filled in with sanitized data.

The shipped prompts have names like `math-trace`, `code-segment-noref` and `science-prefix-checkpoints`: domain,
granularity and measure. They are assembled from the pieces in prompts/parts, so that common text is written once. Any
other prompt is one file with a system and a user section.

prompts/earlier/N has the pieces of the N-th set of shipped prompts. A name means the newest prompt; an earlier prompt,
or an earlier set, is selected only by the hash of its content.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import Literal, get_args

from exprl_megatron.config.problems import BuiltInDomain
from exprl_megatron.errors import UserError
from exprl_megatron.judging.judgement import Granularity

SHIPPED = Path(__file__).parent / "prompts"
PARTS = SHIPPED / "parts"
EARLIER = tuple(sorted(path for path in (SHIPPED / "earlier").iterdir() if path.is_dir()))
"""Directories of the current pieces (PARTS) and of earlier sets, the oldest first."""
PLACEHOLDERS = ("problem", "reference", "rubric", "trace")

Measure = Literal["reference", "noref", "checkpoints"]
"""What a trace is compared with: the reference, the judge's own knowledge, or a rubric of checkpoints."""
PromptOrder = Literal["shared", "upstream"]
"""`shared`: the trace is last, so that the requests about one problem share a prefix. `upstream`: the reference is
last, as in the released code; by default it uses the first set, which has the questions and scales of that code."""

_SECTION = re.compile(r"^## (system|user)[ \t]*$", re.MULTILINE)
_PART = re.compile(r"^## ([a-z-]+)[ \t]*$", re.MULTILINE)
_HASH = re.compile(r"[0-9a-f]{16}")
_SHOWN = 200
"""Characters of a name that an error message quotes."""
_SOUNDNESS = re.compile(r"\bSound: ", re.ASCII)
# A brace after a letter or a brace belongs to TeX (\boxed{x}, a_{n}) and is not a placeholder.
# One right after another placeholder is one.
_PLACEHOLDER = re.compile(
    r"(?:(?<![\w}^\\])|" + "|".join(rf"(?<={{{name}}})" for name in PLACEHOLDERS) + r")\{([a-z_]+)\}"
)
_TAG = re.compile(r"</([a-z]+)>")


@dataclass(frozen=True)
class PromptFrame:
    """The messages about one problem without the trace: the part that all traces of the problem share."""

    parts: tuple[tuple[str, tuple[str, ...]], ...]
    """For each message its role and the pieces of its content; the trace goes between two pieces."""

    def messages(self, trace: str) -> list[dict[str, str]]:
        """Build the chat messages about `trace`, which must be sanitized already (see InjectionGuard)."""
        return [{"role": role, "content": trace.join(pieces)} for role, pieces in self.parts]


@dataclass(frozen=True)
class JudgePrompt:
    """Templates of the two messages to a judge; `{problem}`, `{reference}`, ... are filled in."""

    system: str | None
    user: str

    @cached_property
    def version(self) -> str:
        """The hash of the content, 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps([self.system, self.user]).encode()).hexdigest()[:16]

    @cached_property
    def placeholders(self) -> frozenset[str]:
        """Names of the placeholders."""
        return frozenset(_PLACEHOLDER.findall(self._text))

    @cached_property
    def tags(self) -> frozenset[str]:
        """Names of the tags around data, which data must not contain (see InjectionGuard)."""
        return frozenset(_TAG.findall(self._text)) | {*PLACEHOLDERS, "checkpoints"}

    @cached_property
    def asks_soundness(self) -> bool:
        """Whether the prompt asks for a line `Sound: ` in addition to the marks of checkpoints (see Rubric.score)."""
        return "rubric" in self.placeholders and _SOUNDNESS.search(self._text) is not None

    def messages(
        self, problem: str, reference: str, trace: str, rubric: str = "", guard: Callable[[str], str] = str
    ) -> list[dict[str, str]]:
        """Build the chat messages, with each text sanitized by `guard`.

        All placeholders are filled in one pass, so that braces within the data are not placeholders.
        """
        return self.frame(problem, reference, rubric, guard).messages(guard(trace))

    def frame(self, problem: str, reference: str, rubric: str = "", guard: Callable[[str], str] = str) -> PromptFrame:
        """Build the messages without a trace; arguments as of `messages`."""
        texts = {"problem": problem, "reference": reference, "rubric": rubric}
        data = {name: guard(text) for name, text in texts.items() if name in self.placeholders}
        parts = [("system", self.system), ("user", self.user)]
        return PromptFrame(tuple((role, _pieces(text, data)) for role, text in parts if text is not None))

    @property
    def _text(self) -> str:
        return f"{self.system or ''}\n{self.user}"


def load_prompt(name: str, order: PromptOrder = "shared", shows: str = "trace") -> JudgePrompt:
    """Load a judge prompt. A prompt file is text with the sections `## system` (optional) and `## user`.

    Args:
        name: the name of a shipped prompt, the hash of one (`JudgePrompt.version`), or the path of a file.
        order: the order of the sections, for shipped prompts that are assembled.
        shows: the placeholder that the prompt must have.

    Raises:
        UserError: the file does not exist, has no user section, has an unknown placeholder, or does not have the
            placeholder `shows`.
    """
    if name in shipped_names():
        return shipped_prompt(*shipped_names()[name], order)
    if _HASH.fullmatch(name) and name in _prompts_by_hash():
        prompt, source = _prompts_by_hash()[name], name
    else:
        prompt, source = _from_file(name)
    if unknown := sorted(prompt.placeholders - set(PLACEHOLDERS)):
        raise UserError(
            f"The judge prompt {source} has the unknown placeholder {{{unknown[0]}}}; "
            f"the known ones are {', '.join(PLACEHOLDERS)}."
        )
    if shows not in prompt.placeholders:
        raise UserError(f"The judge prompt {source} never shows the {shows}; put {{{shows}}} into its user section.")
    return prompt


@cache
def shipped_names() -> dict[str, tuple[BuiltInDomain, Granularity, Measure]]:
    """Return the names of the shipped prompts with their domain, granularity and measure."""
    return {
        f"{domain}-{granularity}" + ("" if measure == "reference" else f"-{measure}"): (domain, granularity, measure)
        for domain in get_args(BuiltInDomain)
        for granularity in get_args(Granularity)
        for measure in get_args(Measure)
    }


def shipped_prompt(
    domain: str,
    granularity: Granularity,
    measure: Measure,
    order: PromptOrder = "shared",
    prompt_set: str | None = None,
) -> JudgePrompt:
    """Assemble the shipped prompt of a domain, granularity and measure.

    Args:
        domain: a built-in domain.
        granularity: what part of a trace is judged.
        measure: what it is compared with.
        order: the order of the sections.
        prompt_set: hash of a set of shipped prompts (see `prompt_set_hash`); None: the current set, or the first one
            for the order `upstream`.

    Raises:
        UserError: there is no such set, or the domain is not built in.
    """
    if domain not in get_args(BuiltInDomain):
        setting = {"trace": "judge.prompt", "prefix": "judge.prefix_prompt", "segment": "judge.segment_prompt"}
        what = "that shows {rubric}" if measure == "checkpoints" else "without {rubric}"
        raise UserError(
            f"No shipped judge prompt is for the domain {domain!r}; set {setting[granularity]} to a prompt file of "
            f"your own {what} (docs/extending.md)."
        )
    return _assembled(_set_parts(order, prompt_set), domain, granularity, measure, order)


def prompt_set_hash(order: PromptOrder = "shared", prompt_set: str | None = None) -> str:
    """Hash the versions of all prompts of a set in the order `shared` (SHA-256, hex); arguments as of `shipped_prompt`.

    Raises:
        UserError: there is no such set.
    """
    return _set_hash(_set_parts(order, prompt_set))


def is_shipped_hash(content: str) -> bool:
    """Return whether a current or earlier shipped prompt, or a set of them, has this hash."""
    return content in _prompts_by_hash() or content in map(_set_hash, (*EARLIER, PARTS))


def _set_parts(order: PromptOrder, prompt_set: str | None) -> Path:
    """Return the directory of a set's pieces."""
    if prompt_set is None:
        return EARLIER[0] if order == "upstream" else PARTS
    known = {_set_hash(parts): parts for parts in (*EARLIER, PARTS)}
    if prompt_set not in known:
        raise UserError(
            f"There is no set of shipped prompts with the hash {prompt_set}; the known ones are {', '.join(known)}."
        )
    return known[prompt_set]


@cache
def _set_hash(parts: Path) -> str:
    versions = [_assembled(parts, *case, "shared").version for case in shipped_names().values()]
    return hashlib.sha256(json.dumps(versions).encode()).hexdigest()


@cache
def _prompts_by_hash() -> dict[str, JudgePrompt]:
    """Return all prompts of all sets, in both orders, and the rubric builders, by version."""
    sets = product((*EARLIER, PARTS), shipped_names().values(), get_args(PromptOrder))
    prompts = [_assembled(parts, *case, order) for parts, case, order in sets]
    prompts += [_parsed(path / "rubric-builder.md") for path in (*EARLIER, SHIPPED)]
    return {prompt.version: prompt for prompt in prompts}


@cache
def _assembled(parts: Path, domain: str, granularity: Granularity, measure: Measure, order: PromptOrder) -> JudgePrompt:
    common, own = _parts(parts / "common.md"), _parts(parts / f"{domain}.md")
    marked = measure == "checkpoints"
    # The first set has no pieces about soundness.
    soundness = [common.get("task-soundness"), own.get("soundness")]
    tasks = [common["task-checkpoints"], *filter(None, soundness)] if marked else [own[granularity]]
    answer = common["answer-checkpoints" if marked else "answer-score"]
    introduction = [own["role"], common[f"shown-{granularity}"], common[f"measure-{measure}"]]
    sections = [f"section-{granularity}"] if measure == "noref" else [f"section-{measure}", f"section-{granularity}"]
    if order == "upstream":
        sections.reverse()
    return JudgePrompt(
        system="\n\n".join([*introduction, *tasks, common["data"], answer]),
        user="\n\n".join(common[name] for name in ["section-problem", *sections]),
    )


@cache
def _parts(path: Path) -> dict[str, str]:
    """Return the pieces in a file; what is before the first heading is for people."""
    pieces = _PART.split(path.read_text(encoding="utf-8"))
    return dict(zip(pieces[1::2], (text.strip() for text in pieces[2::2]), strict=True))


def _from_file(name: str) -> tuple[JudgePrompt, str]:
    """Read the prompt in the shipped or other file of this name; returns it with the file's path."""
    path = SHIPPED / f"{name}.md"
    if not _is_file(path):
        path = Path(name).expanduser()
    if not _is_file(path):
        near = difflib.get_close_matches(name, [*(p.stem for p in SHIPPED.glob("*.md")), *shipped_names()], n=1)
        advice = (
            f"did you mean {near[0]}?"
            if near
            else (
                "give the path of a file, the hash of an earlier shipped prompt or the name of a shipped one, such as "
                "math-trace or miniature; docs/judging.md describes them."
            )
        )
        shown = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..."
        raise UserError(f"There is no judge prompt {shown!r}; {advice}")
    return _parsed(path), str(path)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a whole prompt in place of a path is too long a name
        return False


def _parsed(path: Path) -> JudgePrompt:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"The judge prompt {path} is not UTF-8 text ({error}); convert it.") from error
    except OSError as error:
        raise UserError(f"The judge prompt {path} cannot be read ({error.strerror}); correct the path.") from error
    pieces = _SECTION.split(text)
    names, texts = pieces[1::2], [text.strip() for text in pieces[2::2]]
    sections = dict(zip(names, texts, strict=True))
    if len(names) != len(sections) or "user" not in sections or pieces[0].strip():
        raise UserError(
            f"The judge prompt {path} is not made of one section `## user` and at most one `## system`; fix it."
        )
    return JudgePrompt(sections.get("system"), sections["user"])


def _pieces(template: str, data: dict[str, str]) -> tuple[str, ...]:
    """Fill `data` into the template, and cut it at each `{trace}`."""
    pieces, end = [""], 0
    for match in _PLACEHOLDER.finditer(template):
        pieces[-1] += template[end : match.start()]
        end = match.end()
        if match[1] == "trace":
            pieces.append("")
        else:
            pieces[-1] += data[match[1]]
    pieces[-1] += template[end:]
    return tuple(pieces)
