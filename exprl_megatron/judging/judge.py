"""The judge: asks a frozen language model, with the reference in its hands, what a trace is worth."""

import asyncio
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from exprl_megatron.config.judging import JudgeConfig
from exprl_megatron.errors import UserError
from exprl_megatron.judging.answers import Answer, ChatAnswerer, Question, TokenAnswerer
from exprl_megatron.judging.asking import REQUEST_GRACE_S, Inquiry, JudgeServers
from exprl_megatron.judging.cases import Case, CaseBuilder
from exprl_megatron.judging.judge_model import model_context, model_identity, model_vocabulary
from exprl_megatron.judging.judge_tokenizer import JudgeTokenizer
from exprl_megatron.judging.judgement import Abstained, Judgement, Scored, Unit
from exprl_megatron.judging.question_turns import Turn, Turns
from exprl_megatron.judging.rubric import VALUES, Rubric
from exprl_megatron.judging.rubric_builder import RubricBuilder
from exprl_megatron.judging.store import JudgementStore, is_final
from exprl_megatron.judging.verdict import (
    expected_score,
    normalise,
    read_marks,
    read_soundness,
    read_verdict,
    stated_score,
)
from exprl_megatron.problems.problem import Problem, Reference
from exprl_megatron.problems.prompts import check_template
from exprl_megatron.utils.together import together
from exprl_megatron.utils.token_ids import TokenIds

_SAMPLE = Problem("sample", "1 + 1", Reference("The sum of 1 and 1 is 2."))
SCORE_REGEX = "Score: [1-5]"
SOUNDNESS_REGEX = r'Sound: (yes|no - "[^"\n]{1,160}")'


@dataclass(frozen=True, eq=False)
class _Pending:
    """A case that is to be judged."""

    case: Case
    turn: Turn
    found: Judgement | None
    """What the store has."""
    request: TokenIds | None
    """The tokens, where the store has nothing."""


class Judge:
    """Grades traces; use within one event loop.

    `clients` are opened SGLangClients of the judge's servers, or OpenAIEndpoints where the config has `endpoints`;
    `tokenizer` is the judge's own Hugging Face tokenizer, `context_tokens` the longest request that the servers take,
    answer included (by default what the model's config.json says). With a `store` nothing is asked twice.

    All requests about a problem go to the same server as a rule, whose radix cache then holds what they share.
    `counts` counts `asked`, `reasked`, `retried`, `hedged`, `hedge-won` (see JudgeServers) and `stored` (judgements
    that the store knew); `rubric_fallbacks` the problems judged without a rubric, by reason (see RubricBuilder).

    Raises UserError where a prompt cannot be used or the tokenizer has no chat template.
    """

    def __init__(
        self,
        config: JudgeConfig,
        clients: Sequence[Any],
        tokenizer: Any,
        context_tokens: int | None = None,
        store: JudgementStore | None = None,
    ):
        if not tokenizer.chat_template:
            raise UserError(f"The judge's tokenizer in {config.model} has no chat template; add one to it.")
        self._config = config
        self._tokenizer = JudgeTokenizer(tokenizer, config.template_args)
        self._context_tokens = context_tokens or model_context(config.model)
        self._store = store
        identity = {} if store is None else _identity(config)
        self._cases = CaseBuilder(config, tokenizer, identity)
        check_template(tokenizer, self.messages(_SAMPLE, "2"), config.template_args, "judge")
        self._turns = Turns()
        self.counts: Counter[str] = Counter()
        self._servers = JudgeServers(config, [self._answerer(client, tokenizer) for client in clients], self.counts)
        self._rubrics = RubricBuilder(
            config, self._servers, self._tokens, self._cases.guard, self._context_tokens, identity, store
        )

    @property
    def rubric_fallbacks(self) -> Counter[str]:
        """Problems that are judged by their reference alone although checkpoints are wanted, by reason."""
        return self._rubrics.fallbacks

    async def grade(self, problem: Problem, text: str, unit: Unit = "trace") -> Judgement:
        """The verdict on a trace, a beginning of one, or a segment alone, as `unit` says.

        A problem without a reference is judged without one. Abstains with `unreadable`, `out-of-range` or `cut-off`
        after asking again as often as the config says, `timeout`, `too-long`, `refused`, and `server-error` where this
        request fails although a server is well. Raises ServerError where no server is.
        """
        return (await self._judgements(problem, [text], unit))[0]

    async def grade_prefixes(self, problem: Problem, texts: Sequence[str]) -> list[Judgement]:
        """The verdicts on beginnings of one trace, the longest of which is the last; raises and abstains as `grade`.

        The server reads the longest one first, alone: asked together, all would be read together, each from its start.
        """
        return await self._judgements(problem, texts, "prefix", read_last=len(texts) > 1)

    def messages(self, problem: Problem, text: str, unit: Unit = "trace", rubric: Rubric | None = None) -> list[dict]:
        """The chat in which the judge is asked."""
        (case,) = self._cases.cases(problem, [text], unit, rubric)
        return case.frame.messages(case.shown)

    def request(self, problem: Problem, text: str, unit: Unit = "trace", rubric: Rubric | None = None) -> list[int]:
        """The same in token ids, under the judge's template."""
        return self._tokenizer.request(self.messages(problem, text, unit, rubric)).tolist()

    async def _judgements(
        self, problem: Problem, texts: Sequence[str], unit: Unit, read_last: bool = False
    ) -> list[Judgement]:
        """Prompts, keys and tokens are made, and the store is read, in other threads than the event loop's."""
        rubric = None
        if self._config.rubric.kind == "checkpoints" and self._cases.shows_reference(problem):
            rubric = await self._rubrics.rubric(problem)
        cases = await asyncio.to_thread(self._cases.cases, problem, texts, unit, rubric)
        # Before the store is read: what others find out from here on is seen in their turn, what they did before there.
        turns = [Turn() if self._store is None else self._turns.of(case.key) for case in cases]
        found, requests = await asyncio.to_thread(self._found_and_requests, cases)
        if read_last and not self._config.endpoints and found[-1] is None:
            await self._read(cases[-1], requests[-1])
        judged = await self._judged(list(map(_Pending, cases, turns, found, requests)))
        return list(map(self._with_hash, cases, judged))

    def _with_hash(self, case: Case, judgement: Judgement) -> Judgement:
        """The judgement with the key under which the store has it."""
        return replace(judgement, hash=case.key) if is_final(judgement) and self._store is not None else judgement

    def _found_and_requests(self, cases: Sequence[Case]) -> tuple[list[Judgement | None], list[TokenIds | None]]:
        """What the store has of each case, and the tokens of those that it does not have."""
        found = [None] * len(cases) if self._store is None else self._store.find_judgements([c.key for c in cases])
        missing = [case for case, judgement in zip(cases, found, strict=True) if judgement is None]
        shown = [case.shown for case in missing]
        requests = iter(self._tokenizer.requests(missing[0].frame, shown) if missing else ())
        return found, [next(requests) if judgement is None else None for judgement in found]

    async def _judged(self, pending: Sequence[_Pending]) -> list[Judgement]:
        """Equal beginnings of a group's traces come at the same time: one is asked, the others find the answer.

        All that nobody else is asking at the moment is asked together.
        """
        free = [each for each in pending if each.found is None and each.turn.judgement is None and each.turn.take()]
        # Awaited here and not in a task: a task that is canceled before its first step would never leave the turns.
        asked = dict(zip(free, await self._asked(free), strict=True)) if free else {}
        rest = await together(self._judged_in_turn(each) for each in pending if each not in asked)
        others = iter(rest)
        return [asked[each] if each in asked else next(others) for each in pending]

    async def _judged_in_turn(self, each: _Pending) -> Judgement:
        known = each.found
        if known is None:
            await each.turn.come()
            if each.turn.judgement is None:
                return (await self._asked([each]))[0]
            known = each.turn.judgement
            each.turn.leave()
        self.counts["stored"] += 1
        return known

    async def _asked(self, pending: Sequence[_Pending]) -> list[Judgement]:
        """The judgements, which are on disk then; the caller has the turns, and they are left here."""
        try:
            verdicts = await self._verdicts(pending)
            if self._store is not None:
                # On disk before anything is learned from it.
                rows = [
                    (each.case.key, self._cases.asked(each.case), answer, judgement)
                    for each, (judgement, answer) in zip(pending, verdicts, strict=True)
                ]
                await asyncio.wrap_future(self._store.keep_judgements_soon(rows))
                for each, (judgement, _) in zip(pending, verdicts, strict=True):
                    if is_final(judgement):
                        each.turn.judgement = judgement
            return [judgement for judgement, _ in verdicts]
        finally:
            for each in pending:
                each.turn.leave()

    async def _verdicts(self, pending: Sequence[_Pending]) -> list[tuple[Judgement, str]]:
        """The judgements and the judge's last words."""
        asked = [each for each in pending if not self._too_long(each.request)]
        inquiries = [
            Inquiry(tuple(self._questions(each.case, each.request)), self._reader(each.case)) for each in asked
        ]
        home = self._home(pending[0].case.problem)
        found = dict(
            zip(asked, await self._servers.ask_together(inquiries, home, self._config.deadline_s), strict=True)
        )
        return [found.get(each) or (self._abstained_too_long(each.request), "") for each in pending]

    def _abstained_too_long(self, request: TokenIds) -> Abstained:
        return Abstained("too-long", f"{len(request)} prompt tokens, {self._context_tokens} in all")

    async def _read(self, case: Case, request: TokenIds) -> None:
        """Have the question read, so that others that begin like it are found in the server's cache."""
        if self._too_long(request):
            return
        deadline_s = self._config.deadline_s
        question = Question(
            case.frame, case.shown, request, 0, temperature=0.0, seed=0, deadline_s=deadline_s + REQUEST_GRACE_S
        )
        # What goes wrong here goes wrong with the questions themselves, which report it.
        await self._servers.ask([question], self._home(case.problem), deadline_s, lambda answer: None)

    def _too_long(self, input_ids: Sequence[int]) -> bool:
        return len(input_ids) + self._config.max_new_tokens > self._context_tokens

    def _home(self, problem: Problem) -> int:
        return zlib.crc32(problem.id.encode())

    def _questions(self, case: Case, request: TokenIds) -> Iterator[Question]:
        """The question, and then as often as the config says the same again, sampled."""
        config, seed = self._config, zlib.crc32(case.text.encode("utf-8", "surrogatepass"))
        for attempt in range(1 + config.reasks):
            yield Question(
                frame=case.frame,
                trace=case.shown,
                input_ids=request,
                max_new_tokens=config.max_new_tokens,
                temperature=config.reask_temperature if attempt else config.temperature,
                seed=(seed + attempt) % 2**31,
                deadline_s=config.deadline_s + REQUEST_GRACE_S,
                regex=_answer_regex(case) if config.score_format == "constrained" else None,
                probabilities=config.score_reading == "expected" and case.rubric is None,
            )

    def _reader(self, case: Case) -> Callable[[Answer], Judgement]:
        def marked(answer: Answer) -> Judgement:
            if answer.cut_off:
                return Abstained("cut-off", answer.text)
            marks = read_marks(answer.text, len(case.rubric.checkpoints))
            soundness = read_soundness(answer.text) if case.prompt.asks_soundness else None
            if marks is None or (soundness is None and case.prompt.asks_soundness):
                return Abstained("unreadable", answer.text)
            sound = None if soundness is None else soundness.sound
            return Scored(case.rubric.score(marks, case.unit, sound), answer.text)

        def scored(answer: Answer) -> Judgement:
            return read_answer(answer, self._config)

        return scored if case.rubric is None else marked

    def _answerer(self, client: Any, tokenizer: Any) -> TokenAnswerer | ChatAnswerer:
        if self._config.endpoints:
            return ChatAnswerer(client, self._config.template_args)
        return TokenAnswerer(client, tokenizer, model_vocabulary(self._config.model))

    async def _tokens(self, messages: Sequence[dict]) -> TokenIds:
        return await asyncio.to_thread(self._tokenizer.request, messages)


def read_answer(answer: Answer, config: JudgeConfig) -> Judgement:
    """The score that an answer states, or its expectation where the config says so.

    An answer that the length limit cut off states none, except to the released parser, which reads any text. Where the
    server does not report the probabilities at the stated digit's place, the digit counts as it is.
    """
    if answer.cut_off and config.parser != "released":
        return Abstained("cut-off", answer.text)
    verdict = read_verdict(answer.text, config.parser)
    if config.score_reading == "stated" or not isinstance(verdict, Scored):
        return verdict
    probabilities = answer.digit_probabilities(stated_score(answer.text, config.parser).place)
    expected = expected_score(probabilities) if probabilities is not None else None
    return verdict if expected is None else Scored(normalise(expected), answer.text)


def _answer_regex(case: Case) -> str:
    """Constrains an answer to the verdict alone."""
    if case.rubric is None:
        return SCORE_REGEX
    marks = "|".join(VALUES)
    lines = [f"Mark {number}: ({marks})" for number in range(1, len(case.rubric.checkpoints) + 1)]
    return r"\n".join([*lines, SOUNDNESS_REGEX] if case.prompt.asks_soundness else lines)


def _identity(config: JudgeConfig) -> dict[str, str]:
    """What, apart from the question, decides the answer: the model and how it is sampled and read."""
    sampling = config.model_dump(
        include={
            *("max_new_tokens", "temperature", "template_args", "score_format", "score_reading", "parser"),
            *("reasks", "reask_temperature"),
        }
    )
    model = f"{config.endpoint_model} {model_identity(config.model)}" if config.endpoints else None
    return {"judge": model or model_identity(config.model), "sampling": json.dumps(sampling, sort_keys=True)}
