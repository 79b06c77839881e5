"""The judge: prompts a frozen language model with the reference solution and reads the score of a trace."""

import asyncio
import json
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from exprl_megatron.config.judging import JudgeConfig
from exprl_megatron.errors import UserError
from exprl_megatron.judging.answer_reading import answer_reader, answer_regex
from exprl_megatron.judging.answers import ChatAnswerer, JudgeQuestion, TokenAnswerer
from exprl_megatron.judging.asking import REQUEST_GRACE_S, Inquiry, JudgePool
from exprl_megatron.judging.cases import Case, CaseBuilder
from exprl_megatron.judging.judge_model import model_context, model_identity, model_vocabulary
from exprl_megatron.judging.judge_tokenizer import JudgeTokenizer
from exprl_megatron.judging.judgement import Abstained, Granularity, Judgement
from exprl_megatron.judging.null_tokenizer import NullTokenizer
from exprl_megatron.judging.question_locks import QuestionLock, QuestionLocks
from exprl_megatron.judging.rubric import Rubric
from exprl_megatron.judging.rubric_builder import RubricBuilder
from exprl_megatron.judging.store import JudgementStore, is_final
from exprl_megatron.problems.problem import Problem, Reference
from exprl_megatron.problems.prompts import check_template
from exprl_megatron.utils.together import gather_or_cancel
from exprl_megatron.utils.token_ids import TokenIds

_SAMPLE = Problem("sample", "1 + 1", Reference("The sum of 1 and 1 is 2."))


@dataclass(frozen=True, eq=False)
class _Pending:
    """A case that needs a judgement."""

    case: Case
    lock: QuestionLock
    found: Judgement | None
    """The judgement that the store has, if any."""
    request: TokenIds | None
    """The tokens of the prompt; None where the store has a judgement."""

    @property
    def tokens(self) -> TokenIds:
        """The tokens of the prompt; ValueError where the store has a judgement."""
        if self.request is None:
            raise ValueError("a case that the store has is not asked")
        return self.request


class Judge:
    """Grades traces with a language model; all calls must come from one event loop.

    Args:
        config: the section `judge` of the run's config.
        clients: open SGLangClients of the judge's servers, or OpenAIEndpoints where the config has `endpoints`.
        tokenizer: the judge's Hugging Face tokenizer; None for a closed API, which counts tokens itself.
        context_tokens: longest request plus answer that the servers accept; by default the limit in config.json.
        store: judgements and rubrics of earlier requests; with a store no question is asked twice.

    All requests about a problem normally go to the same server, whose radix cache then has their common prefix.
    `counts` has the numbers of requests `asked`, `reasked`, `retried`, `hedged`, `hedge-won` (see JudgePool) and of
    judgements `stored` that came from the store.

    Raises:
        UserError: a prompt cannot be used, or the tokenizer has no chat template.
    """

    def __init__(
        self,
        config: JudgeConfig,
        clients: Sequence[Any],
        tokenizer: Any,
        context_tokens: int | None = None,
        store: JudgementStore | None = None,
    ):
        if tokenizer is not None and not tokenizer.chat_template:
            raise UserError(f"The judge's tokenizer in {config.model} has no chat template; add one to it.")
        self._config = config
        self._tokenizer: JudgeTokenizer | NullTokenizer
        if tokenizer is None:
            self._tokenizer, self._context_tokens = NullTokenizer(), sys.maxsize
        else:
            self._tokenizer = JudgeTokenizer(tokenizer, config.template_args)
            self._context_tokens = context_tokens or model_context(config.served_model)
        self._store = store
        identity = {} if store is None else _identity(config)
        self._cases = CaseBuilder(config, tokenizer, identity)
        if tokenizer is not None:
            check_template(tokenizer, self.messages(_SAMPLE, "2"), config.template_args, "judge")
        self._locks = QuestionLocks()
        self.counts: Counter[str] = Counter()
        self._servers = JudgePool(config, [self._answerer(client, tokenizer) for client in clients], self.counts)
        self._rubrics = RubricBuilder(
            config, self._servers, self._tokens, self._cases.guard, self._context_tokens, identity, store
        )

    @property
    def rubric_fallbacks(self) -> Counter[str]:
        """Number of problems judged by their reference, although the config asks for checkpoints, by reason."""
        return self._rubrics.fallbacks

    async def grade(self, problem: Problem, text: str, granularity: Granularity = "trace") -> Judgement:
        """Judge `text`: a whole trace, a prefix of one, or a single segment, as `granularity` says.

        A problem without a reference is judged without one. Returns Abstained with the reason `unreadable`,
        `out-of-range` or `cut-off` after `judge.reasks` repetitions, `timeout`, `too-long`, `refused`, or
        `server-error` where the request fails although a server is healthy.

        Raises:
            ServerError: no server of the judge is healthy.
        """
        return (await self._judgements(problem, [text], granularity))[0]

    async def grade_prefixes(self, problem: Problem, texts: Sequence[str]) -> list[Judgement]:
        """Judge prefixes of one trace, of which the last is the longest; raises and abstains as `grade` does.

        The longest prefix is prefilled first, alone: requests that arrive together would each be prefilled in full.
        """
        return await self._judgements(problem, texts, "prefix", prefill_last=len(texts) > 1)

    def messages(
        self, problem: Problem, text: str, granularity: Granularity = "trace", rubric: Rubric | None = None
    ) -> list[dict]:
        """Build the chat messages of the judge's prompt."""
        (case,) = self._cases.build(problem, [text], granularity, rubric)
        return case.frame.messages(case.sanitized)

    def prompt_ids(
        self, problem: Problem, text: str, granularity: Granularity = "trace", rubric: Rubric | None = None
    ) -> list[int]:
        """Build the token ids of the judge's prompt, under its chat template."""
        return self._tokenizer.prompt_ids(self.messages(problem, text, granularity, rubric)).tolist()

    async def _judgements(
        self, problem: Problem, texts: Sequence[str], granularity: Granularity, prefill_last: bool = False
    ) -> list[Judgement]:
        """Judge several texts of one problem; prompts, keys, tokens and the store are handled outside the event loop.

        `prefill_last` prefills the last text before any question is sent.
        """
        rubric = None
        if self._config.rubric.kind == "checkpoints" and self._cases.shows_reference(problem):
            rubric = await self._rubrics.rubric(problem)
        cases = await asyncio.to_thread(self._cases.build, problem, texts, granularity, rubric)
        # Locks are looked up before the store is read: a judgement that another caller makes is either in the store by
        # then, or its lock has the judgement.
        locks = [QuestionLock() if self._store is None else self._locks.of(case.key) for case in cases]
        found, requests = await asyncio.to_thread(self._look_up_and_tokenize, cases)
        if prefill_last and not self._config.endpoints and (last := requests[-1]) is not None:
            await self._prefill(cases[-1], last)
        judged = await self._judge_all(list(map(_Pending, cases, locks, found, requests)))
        return list(map(self._with_hash, cases, judged))

    def _with_hash(self, case: Case, judgement: Judgement) -> Judgement:
        """Add the key of the store to a judgement that is stored."""
        return replace(judgement, hash=case.key) if is_final(judgement) and self._store is not None else judgement

    def _look_up_and_tokenize(self, cases: Sequence[Case]) -> tuple[list[Judgement | None], list[TokenIds | None]]:
        """Look the cases up in the store, and tokenize the prompts of those that it does not have."""
        found: list[Judgement | None] = [None] * len(cases)
        if self._store is not None:
            found = list(self._store.find_judgements([case.key for case in cases]))
        missing = [case for case, judgement in zip(cases, found, strict=True) if judgement is None]
        shown = [case.sanitized for case in missing]
        requests = iter(self._tokenizer.batch_prompt_ids(missing[0].frame, shown) if missing else ())
        return found, [next(requests) if judgement is None else None for judgement in found]

    async def _judge_all(self, pending: Sequence[_Pending]) -> list[Judgement]:
        """Judge all cases; of equal cases that are pending at the same time, one is sent and the others wait for it.

        Cases that no other caller is judging are sent as one batch.
        """
        free = [
            each for each in pending if each.found is None and each.lock.judgement is None and each.lock.try_acquire()
        ]
        # Awaited here and not in a task: a task that is canceled before its first step would never release the locks.
        asked = dict(zip(free, await self._ask_and_store(free), strict=True)) if free else {}
        rest = await gather_or_cancel(self._wait_or_ask(each) for each in pending if each not in asked)
        others = iter(rest)
        return [asked[each] if each in asked else next(others) for each in pending]

    async def _wait_or_ask(self, each: _Pending) -> Judgement:
        known = each.found
        if known is None:
            await each.lock.acquire()
            if each.lock.judgement is None:
                return (await self._ask_and_store([each]))[0]
            known = each.lock.judgement
            each.lock.release()
        self.counts["stored"] += 1
        return known

    async def _ask_and_store(self, pending: Sequence[_Pending]) -> list[Judgement]:
        """Send the cases to the judge and store the judgements; releases the locks, which the caller has taken."""
        try:
            verdicts = await self._verdicts(pending)
            if self._store is not None:
                # Judgements are on disk before anything is learned from them.
                rows = [
                    (each.case.key, self._cases.stored_question(each.case), answer, judgement)
                    for each, (judgement, answer) in zip(pending, verdicts, strict=True)
                ]
                await asyncio.wrap_future(self._store.submit_judgements(rows))
                for each, (judgement, _) in zip(pending, verdicts, strict=True):
                    if is_final(judgement):
                        each.lock.judgement = judgement
            return [judgement for judgement, _ in verdicts]
        finally:
            for each in pending:
                each.lock.release()

    async def _verdicts(self, pending: Sequence[_Pending]) -> list[tuple[Judgement, str]]:
        """Send the cases to the judge; returns each judgement with the text of the judge's last answer."""
        asked = [each for each in pending if not self._too_long(each.tokens)]
        inquiries = [
            Inquiry(tuple(self._questions(each.case, each.tokens)), answer_reader(each.case, self._config))
            for each in asked
        ]
        home = self._home(pending[0].case.problem)
        found = dict(
            zip(asked, await self._servers.ask_together(inquiries, home, self._config.deadline_s), strict=True)
        )
        return [found.get(each) or (self._abstained_too_long(each.tokens), "") for each in pending]

    def _abstained_too_long(self, request: TokenIds) -> Abstained:
        return Abstained("too-long", f"{len(request)} prompt tokens, {self._context_tokens} in all")

    async def _prefill(self, case: Case, request: TokenIds) -> None:
        """Prefill the prompt of `case`, so that the server's prefix cache has it when prompts that extend it arrive."""
        if self._too_long(request):
            return
        deadline_s = self._config.deadline_s
        question = JudgeQuestion(
            case.frame, case.sanitized, request, 0, temperature=0.0, seed=0, deadline_s=deadline_s + REQUEST_GRACE_S
        )
        # A failure here is ignored: the questions themselves fail in the same way and report it.
        await self._servers.ask([question], self._home(case.problem), deadline_s, lambda answer: None)

    def _too_long(self, input_ids: Sequence[int]) -> bool:
        return len(input_ids) + self._config.max_new_tokens > self._context_tokens

    def _home(self, problem: Problem) -> int:
        return zlib.crc32(problem.id.encode())

    def _questions(self, case: Case, request: TokenIds) -> Iterator[JudgeQuestion]:
        """Yield the question, and then its `judge.reasks` repetitions, sampled at `judge.reask_temperature`."""
        config, seed = self._config, zlib.crc32(case.text.encode("utf-8", "surrogatepass"))
        for attempt in range(1 + config.reasks):
            yield JudgeQuestion(
                frame=case.frame,
                trace=case.sanitized,
                input_ids=request,
                max_new_tokens=config.max_new_tokens,
                temperature=config.reask_temperature if attempt else config.temperature,
                seed=(seed + attempt) % 2**31,
                deadline_s=config.deadline_s + REQUEST_GRACE_S,
                regex=answer_regex(case) if config.score_format == "constrained" else None,
                probabilities=config.score_reading == "expected" and case.rubric is None,
            )

    def _answerer(self, client: Any, tokenizer: Any) -> TokenAnswerer | ChatAnswerer:
        if self._config.endpoints:
            return ChatAnswerer(client, self._config.template_args)
        return TokenAnswerer(client, tokenizer, model_vocabulary(self._config.served_model))

    async def _tokens(self, messages: Sequence[dict]) -> TokenIds:
        return await asyncio.to_thread(self._tokenizer.prompt_ids, messages)


def _identity(config: JudgeConfig) -> dict[str, str]:
    """Describe what determines an answer besides the prompt: the model, its sampling and how answers are read."""
    sampling = config.model_dump(
        include={
            *("max_new_tokens", "temperature", "template_args", "score_format", "score_reading", "parser"),
            *("reasks", "reask_temperature"),
        }
    )
    if config.endpoint_args:
        sampling["endpoint_args"] = config.endpoint_args
    judge = "" if config.model is None else model_identity(config.model)
    if config.endpoints:
        judge = f"{config.endpoint_model} {judge}".rstrip()
    return {"judge": judge, "sampling": json.dumps(sampling, sort_keys=True)}
