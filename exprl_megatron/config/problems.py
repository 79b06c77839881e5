"""The sources of problems, and the prompts of the policy."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from exprl_megatron.config.base import Config

BuiltInDomain = Literal["math", "multiple-choice", "science", "code"]
"""The domains that have a verifier (except `science`) and judge prompts."""
Domain = str
"""The kind of answer of a problem, which selects its verifier and its judge prompts. A domain that is not built in is
one of `problems.domains`."""


class FieldNames(Config):
    """Names of a record's fields in the source; all but the first two may be missing from a record."""

    id: str = "id"
    """Unique name of the problem."""
    problem: str = "problem"
    """Text of the problem."""
    reference: str = "reference"
    """Reference solution, hidden from the policy."""
    answer: str = "answer"
    """Final answer that the verifier compares with."""
    domain: str = "domain"
    """`math`, `multiple-choice`, `science` or `code`."""
    choices: str = "choices"
    """Answers to choose from."""
    tests: str = "tests"
    """Tests of a program."""
    source: str = "source"
    """Data set that the problem is from."""


class LeakGuardConfig(Config):
    """Checks that no part of a reference is sent to the policy."""

    ngram_words: PositiveInt = 12
    """A request that shares this many consecutive words with a reference, but not with its problem, stops the run."""
    canary: str | None = None
    """A string planted into references (prepare_data.py --canary); a request or trace with it stops the run."""


class ProblemsConfig(Config):
    """One set of problems."""

    source: str
    """A JSON-lines or Parquet file, a directory of them, a hub name, or a function of your own (split) -> records
    (docs/extending.md)."""
    split: str = "train"
    """Split of a data set of the hub."""
    fields: FieldNames = FieldNames()
    limit: PositiveInt | None = None
    """Use this many problems from the beginning."""
    domains: tuple[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")], ...] = ()
    """Domains of your own that its records may have (docs/extending.md)."""
    max_prompt_tokens: PositiveInt | None = None
    """Longer prompts are dropped and counted."""


class PromptConfig(Config):
    """The policy's prompt: an optional system message and the problem's text."""

    system: str | None = None
    """System message; null: none."""
    user: str = "{problem}"
    """Template of the user message; `{problem}` is its only placeholder."""
    template_args: dict[str, bool | str | int] = Field(default_factory=dict)
    """Passed to the chat template (for example `enable_thinking: false`)."""

    def violations(self, run_config) -> list[str]:
        if "{problem}" not in self.user:
            return [f"prompt.user is {self.user!r} and never shows the problem; put {{problem}} into it."]
        return []
