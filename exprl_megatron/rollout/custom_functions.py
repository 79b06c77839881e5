"""Calls verifiers and reward functions of the user.

An exception or a missed deadline is an abstention, as of every verifier. A result of an undocumented type is an error
of the program and stops the run.
"""

import asyncio
import math
from collections.abc import Callable
from copy import copy
from typing import Any

from exprl_megatron.config.verifying import VerifierConfig
from exprl_megatron.judging.judgement import REASON, Abstained, Judgement, Scored, value_and_evidence
from exprl_megatron.plugins.calling import Plugin, as_number, described
from exprl_megatron.plugins.failures import PluginError, place_of_error
from exprl_megatron.problems.problem import Problem
from exprl_megatron.rollout.trace import Trace

ARGUMENTS = ("problem", "trace")
_THREADS = 16
"""Maximum number of concurrent calls of a function that is not async."""
_TASKS = 256
"""Maximum number of concurrent calls of an async function."""
_MAX_EVIDENCE_CHARS = 20_000
"""Maximum length of the evidence that is stored with each trace."""


class CustomFunction:
    """A function (problem, trace) of the user; all calls must come from one event loop.

    Args:
        plugin: the user's function.
        deadline_s: seconds that one call may take.
        log: gets a line for the first failure at each position of the user's code.

    Raises:
        PluginError: the function takes other arguments.
    """

    def __init__(self, plugin: Plugin, deadline_s: float, log: Callable[[str], None] = lambda text: None):
        plugin.check_arguments(ARGUMENTS)
        self.plugin = plugin
        self._deadline_s = deadline_s
        self._log = log
        self._logged: set[str] = set()
        self._free = asyncio.Semaphore(_TASKS if plugin.is_async else _THREADS)

    async def verify(self, problem: Problem, trace: Trace) -> Judgement:
        """Return the function's judgement; abstains with `verifier-timeout` or `verifier-error` where it fails.

        Raises:
            PluginError: the function returned neither Scored nor Abstained.
        """
        found = await self._result(problem, trace)
        if not isinstance(found, Scored | Abstained):
            raise self.plugin.failure(f"returned {described(found)} instead of Scored or Abstained")
        return self._plain(found)

    async def value(self, problem: Problem, trace: Trace) -> tuple[float | None, str]:
        """Return the function's number and its evidence; or None and the reason, where it abstained or failed.

        Raises:
            PluginError: the function returned neither a finite number nor Scored nor Abstained.
        """
        found = await self._result(problem, trace)
        if isinstance(found, Scored | Abstained):
            return value_and_evidence(self._plain(found))
        value = as_number(found)
        if not math.isfinite(value):
            shown = f"{found!r}" if isinstance(found, float) else described(found)
            raise self.plugin.failure(f"returned {shown} instead of a finite number, Scored or Abstained")
        return value, ""

    async def _result(self, problem: Problem, trace: Trace) -> Any:
        try:
            async with self._free:
                # Copies: changes that the function makes must not reach later prompts or the training data.
                return await asyncio.wait_for(self.plugin.ask(copy(problem), copy(trace)), self._deadline_s)
        except PluginError:
            raise
        except TimeoutError:
            place = self.plugin.failure(f"gave no answer within {self._deadline_s:g} s")
            return self._abstained("verifier-timeout", str(place))
        except Exception as error:  # Plugin.ask raises no other, except where the step itself is canceled
            what = f"{self.plugin.path} failed at {place_of_error(error, self.plugin.function)}"
            return self._abstained("verifier-error", what)

    def _plain(self, found: Judgement) -> Judgement:
        """Convert to built-in types, with evidence that can be stored and a reason that fits into a metric's name."""
        evidence = _storable(found.evidence)
        if isinstance(found, Scored):
            return Scored(float(found.value), evidence)
        if isinstance(found.reason, str) and REASON.fullmatch(found.reason):
            return Abstained(found.reason, evidence)
        what = (
            "returned Abstained with a reason that is not a word of at most 24 lower-case letters, digits and hyphens; "
            "put details into its evidence"
        )
        return self._abstained("verifier-error", str(self.plugin.failure(what)).rstrip("."))

    def _abstained(self, reason: str, what: str) -> Abstained:
        place = what.partition(": ")[0]
        if place not in self._logged:
            self._logged.add(place)
            self._log(f"{what}; such traces are abstentions; fix the function, or raise verifier.answer_deadline_s")
        return Abstained(reason, what)


def _storable(evidence: object) -> str:
    """Return the evidence as text that can be encoded; the middle of text above _MAX_EVIDENCE_CHARS is left out."""
    text = "" if evidence is None else evidence if isinstance(evidence, str) else repr(evidence)
    if len(text) > _MAX_EVIDENCE_CHARS:
        half = _MAX_EVIDENCE_CHARS // 2
        text = f"{text[:half]} [{len(text) - 2 * half} characters left out] {text[-half:]}"
    return text.encode(errors="replace").decode()


def custom_verifiers(config: VerifierConfig, log: Callable[[str], None]) -> dict[str, CustomFunction]:
    """Load the verifiers of `verifier.domains`, by domain; `log` gets a line for each new failure.

    Raises:
        PluginError: a function cannot be loaded or takes other arguments.
    """
    return {
        domain: CustomFunction(Plugin.load(f"verifier.domains.{domain}", path), config.deadline_s(domain), log)
        for domain, path in config.domains.items()
    }
