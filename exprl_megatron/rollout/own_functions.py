"""Verifiers and reward functions of the user: how they are called, and what their failures become.

An exception or a missed deadline is an abstention, as of every verifier. A result of another type than is documented is
an error of the program and stops the run.
"""

import asyncio
import math
import re
from collections.abc import Callable
from copy import copy
from typing import Any

from exprl_megatron.config.verifying import VerifierConfig
from exprl_megatron.judging.judgement import Abstained, Judgement, Scored, value_and_evidence
from exprl_megatron.plugins.calling import Plugin, described
from exprl_megatron.plugins.failures import PluginError, place_of_error
from exprl_megatron.problems.problem import Problem
from exprl_megatron.rollout.trace import Trace

ARGUMENTS = ("problem", "trace")
_THREADS = 16
"""Calls of a function that is not async which run at the same time, at most."""
_TASKS = 256
"""The same of an async one."""
_REASON = re.compile(r"[a-z0-9][a-z0-9-]{,23}")
"""It names a metric, which leaves the machine with trackers: too short for a reference."""
_LONGEST_EVIDENCE = 20_000
"""Characters of a finding that are kept with each trace."""


class OwnFunction:
    """A function (problem, trace) of the user; all calls must come from one event loop.

    `say` gets a line for the first failure at each place of the user's code.
    """

    def __init__(self, plugin: Plugin, deadline_s: float, say: Callable[[str], None] = lambda text: None):
        plugin.check_arguments(ARGUMENTS)
        self.plugin = plugin
        self._deadline_s = deadline_s
        self._say = say
        self._said: set[str] = set()
        self._free = asyncio.Semaphore(_TASKS if plugin.is_async else _THREADS)

    async def verify(self, problem: Problem, trace: Trace) -> Judgement:
        """Return the function's verdict; abstains with `verifier-timeout` or `verifier-error` where it has none.

        Raises:
            PluginError: it returned neither Scored nor Abstained.
        """
        found = await self._result(problem, trace)
        if not isinstance(found, Scored | Abstained):
            raise self.plugin.failure(f"returned {described(found)} instead of Scored or Abstained")
        return self._plain(found)

    async def value(self, problem: Problem, trace: Trace) -> tuple[float | None, str]:
        """Return the function's number and its evidence; None, and why, where it abstained or failed.

        Raises:
            PluginError: it returned no finite number, and neither Scored nor Abstained.
        """
        found = await self._result(problem, trace)
        if isinstance(found, Scored | Abstained):
            return value_and_evidence(self._plain(found))
        try:
            value = float(found)
        except Exception:
            value = math.nan
        if not math.isfinite(value):
            shown = f"{found!r}" if isinstance(found, float) else described(found)
            raise self.plugin.failure(f"returned {shown} instead of a finite number, Scored or Abstained")
        return value, ""

    async def _result(self, problem: Problem, trace: Trace) -> Any:
        try:
            async with self._free:
                # Copies: what the function does to them reaches neither later prompts nor what is learned from.
                return await asyncio.wait_for(self.plugin.ask(copy(problem), copy(trace)), self._deadline_s)
        except PluginError:
            raise
        except TimeoutError:
            place = self.plugin.failure(f"gave no answer within {self._deadline_s:g} s")
            return self._abstained("verifier-timeout", str(place))
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # The function's own: one that a library of the user's cancelled must not end the step.
            what = f"{self.plugin.path} failed at {place_of_error(error, self.plugin.function)}"
            return self._abstained("verifier-error", what)
        except (Exception, SystemExit) as error:
            what = f"{self.plugin.path} failed at {place_of_error(error, self.plugin.function)}"
            return self._abstained("verifier-error", what)

    def _plain(self, found: Judgement) -> Judgement:
        """The same in Python's own types, with evidence that can be kept, and a reason that can name a metric."""
        evidence = _kept(found.evidence)
        if isinstance(found, Scored):
            return Scored(float(found.value), evidence)
        if isinstance(found.reason, str) and _REASON.fullmatch(found.reason):
            return Abstained(found.reason, evidence)
        what = (
            "returned Abstained with a reason that is not a word of at most 24 lower-case letters, digits and hyphens; "
            "put details into its evidence"
        )
        return self._abstained("verifier-error", str(self.plugin.failure(what)).rstrip("."))

    def _abstained(self, reason: str, what: str) -> Abstained:
        place = what.partition(": ")[0]
        if place not in self._said:
            self._said.add(place)
            self._say(f"{what}; such traces are abstentions, which verifier.answer_deadline_s and the code decide")
        return Abstained(reason, what)


def _kept(evidence: object) -> str:
    """Evidence as text that a file can hold, without the middle of what is longer than _LONGEST_EVIDENCE."""
    text = "" if evidence is None else evidence if isinstance(evidence, str) else repr(evidence)
    if len(text) > _LONGEST_EVIDENCE:
        half = _LONGEST_EVIDENCE // 2
        text = f"{text[:half]} [{len(text) - 2 * half} characters left out] {text[-half:]}"
    return text.encode(errors="replace").decode()


def own_verifiers(config: VerifierConfig, say: Callable[[str], None]) -> dict[str, OwnFunction]:
    """Load the verifiers of `verifier.domains`, by domain. Raises PluginError."""
    return {
        domain: OwnFunction(Plugin.load(f"verifier.domains.{domain}", path), config.deadline_s(domain), say)
        for domain, path in config.domains.items()
    }
