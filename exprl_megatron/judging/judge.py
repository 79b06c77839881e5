"""The judge: asks a frozen language model, with the reference in its hands, what a trace is worth."""

import asyncio
import json
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from exprl_megatron.config.judging import JudgeConfig
from exprl_megatron.errors import UserError
from exprl_megatron.judging.answers import Answer, ChatAnswerer, Question, TokenAnswerer
from exprl_megatron.judging.asking import REQUEST_GRACE_S, JudgeServers
from exprl_megatron.judging.data import DataGuard, control_tokens
from exprl_megatron.judging.judge_model import model_context, model_identity
from exprl_megatron.judging.judgement import Abstained, Judgement, Scored, Unit
from exprl_megatron.judging.prompt import JudgePrompt, load_prompt, shipped_prompt
from exprl_megatron.judging.rubric import VALUES, Rubric
from exprl_megatron.judging.rubric_builder import RubricBuilder
from exprl_megatron.judging.store import JudgementStore, content_key
from exprl_megatron.judging.verdict import expected_score, normalise, read_marks, read_verdict, stated_score
from exprl_megatron.problems.problem import Problem

SCORE_REGEX = "Score: [1-5]"


@dataclass(frozen=True)
class _Case:
    """What is to be judged, and by what."""

    problem: Problem
    text: str
    unit: Unit
    rubric: Rubric | None
    prompt: JudgePrompt
    messages: tuple[dict[str, str], ...]


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
        self._tokenizer = tokenizer
        self._context_tokens = context_tokens or model_context(config.model)
        self._store = store
        self._overrides = _overrides(config)
        self._control = control_tokens(tokenizer)
        self._tokenizing = asyncio.Lock()
        self._identity = {} if store is None else _identity(config)
        self._being_judged: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self.counts: Counter[str] = Counter()
        self._servers = JudgeServers(config, [self._answerer(client) for client in clients], self.counts)
        self._rubrics = RubricBuilder(
            config, self._servers, self._tokens, self._guard, self._context_tokens, self._identity, store
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
        case = await self._case(problem, text, unit)
        if self._store is None:
            return (await self._judged(case))[0]
        key = self._key(case)
        # Equal beginnings of a group's traces come at the same time: one is asked, the others find the answer.
        lock = self._being_judged.setdefault(key, asyncio.Lock())
        async with lock:
            found = self._store.find_judgement(key)
            if found is not None:
                self.counts["stored"] += 1
                return found
            judgement, answer = await self._judged(case)
            self._store.keep_judgement(key, self._asked(case), answer, judgement)
            return judgement

    async def grade_prefixes(self, problem: Problem, texts: Sequence[str]) -> list[Judgement]:
        """The verdicts on beginnings of one trace, the longest of which is the last; raises and abstains as `grade`.

        The server reads the longest one first, alone: asked together, all would be read together, each from its start.
        """
        if len(texts) > 1 and not self._config.endpoints:
            await self._read(problem, texts[-1])
        return list(await asyncio.gather(*(self.grade(problem, text, "prefix") for text in texts)))

    def messages(self, problem: Problem, text: str, unit: Unit = "trace", rubric: Rubric | None = None) -> list[dict]:
        """The chat in which the judge is asked."""
        return list(self._prepared(problem, text, unit, rubric).messages)

    def request(self, problem: Problem, text: str, unit: Unit = "trace", rubric: Rubric | None = None) -> list[int]:
        """The same in token ids, under the judge's template."""
        return self._token_ids(self.messages(problem, text, unit, rubric))

    async def _case(self, problem: Problem, text: str, unit: Unit) -> _Case:
        rubric = None
        if self._config.rubric.kind == "checkpoints" and self._shows_reference(problem):
            rubric = await self._rubrics.rubric(problem)
        return self._prepared(problem, text, unit, rubric)

    def _prepared(self, problem: Problem, text: str, unit: Unit, rubric: Rubric | None) -> _Case:
        prompt = self._prompt(problem, unit, rubric)
        reference = problem.reference.for_judge() if self._shows_reference(problem) else ""
        rubric_text = rubric.text if rubric is not None else ""
        guard = self._guard(prompt.tags)
        messages = prompt.messages(problem.statement, reference, text, rubric_text, guard)
        return _Case(problem, text, unit, rubric, prompt, tuple(messages))

    def _prompt(self, problem: Problem, unit: Unit, rubric: Rubric | None) -> JudgePrompt:
        own = self._overrides.get(unit)
        if own is not None and ("rubric" in own.placeholders) == (rubric is not None):
            return own
        measure = "checkpoints" if rubric is not None else "reference" if self._shows_reference(problem) else "noref"
        return shipped_prompt(problem.domain, unit, measure, self._config.prompt_order)

    def _shows_reference(self, problem: Problem) -> bool:
        return self._config.show_reference and problem.reference is not None

    async def _judged(self, case: _Case) -> tuple[Judgement, str]:
        """The judgement and the judge's last words."""
        input_ids = await self._tokens(case.messages)
        if self._too_long(input_ids):
            return Abstained("too-long", f"{len(input_ids)} prompt tokens, {self._context_tokens} in all"), ""
        questions = self._questions(case, input_ids)
        return await self._servers.ask(questions, self._home(case.problem), self._config.deadline_s, self._reader(case))

    async def _read(self, problem: Problem, text: str) -> None:
        """Have the question about `text` read, so that others that begin like it are found in the server's cache."""
        case = await self._case(problem, text, "prefix")
        if self._store is not None and self._store.find_judgement(self._key(case)) is not None:
            return
        input_ids = await self._tokens(case.messages)
        if self._too_long(input_ids):
            return
        deadline_s = self._config.deadline_s
        question = Question(
            case.messages, input_ids, 0, temperature=0.0, seed=0, deadline_s=deadline_s + REQUEST_GRACE_S
        )
        # What goes wrong here goes wrong with the questions themselves, which are told of it.
        await self._servers.ask([question], self._home(problem), deadline_s, lambda answer: None)

    def _too_long(self, input_ids: Sequence[int]) -> bool:
        return len(input_ids) + self._config.max_new_tokens > self._context_tokens

    def _home(self, problem: Problem) -> int:
        return zlib.crc32(problem.id.encode())

    def _questions(self, case: _Case, input_ids: tuple[int, ...]) -> Iterator[Question]:
        """The question, and then as often as the config says the same again, sampled."""
        config, seed = self._config, zlib.crc32(case.text.encode("utf-8", "surrogatepass"))
        for attempt in range(1 + config.reasks):
            yield Question(
                messages=case.messages,
                input_ids=input_ids,
                max_new_tokens=config.max_new_tokens,
                temperature=config.reask_temperature if attempt else config.temperature,
                seed=(seed + attempt) % 2**31,
                deadline_s=config.deadline_s + REQUEST_GRACE_S,
                regex=_answer_regex(case.rubric) if config.score_format == "constrained" else None,
                probabilities=config.score_reading == "expected" and case.rubric is None,
            )

    def _reader(self, case: _Case) -> Callable[[Answer], Judgement]:
        def marked(answer: Answer) -> Judgement:
            if answer.cut_off:
                return Abstained("cut-off", answer.text)
            marks = read_marks(answer.text, len(case.rubric.checkpoints))
            if marks is None:
                return Abstained("unreadable", answer.text)
            return Scored(case.rubric.score(marks, case.unit), answer.text)

        def scored(answer: Answer) -> Judgement:
            return read_answer(answer, self._config)

        return scored if case.rubric is None else marked

    def _answerer(self, client: Any) -> TokenAnswerer | ChatAnswerer:
        if self._config.endpoints:
            return ChatAnswerer(client, self._config.template_args)
        return TokenAnswerer(client, self._tokenizer)

    def _guard(self, tags: frozenset[str]) -> DataGuard:
        return DataGuard(tags, self._control, every_score=self._config.parser == "released")

    async def _tokens(self, messages: Sequence[dict]) -> tuple[int, ...]:
        """Thousands of long prompts would hold up the event loop; a tokenizer serves one thread at a time."""
        async with self._tokenizing:
            return tuple(await asyncio.to_thread(self._token_ids, messages))

    def _token_ids(self, messages: Sequence[dict]) -> list[int]:
        return self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False, **self._config.template_args
        )

    def _key(self, case: _Case) -> str:
        problem = case.problem
        return content_key(
            "judgement",
            problem=problem.statement,
            reference=problem.reference.for_judge() if self._shows_reference(problem) else None,
            rubric=case.rubric.to_json() if case.rubric is not None else None,
            prompt=case.prompt.version,
            unit=case.unit,
            trace=case.text,
            **self._identity,
        )

    def _asked(self, case: _Case) -> dict:
        rubric = None if case.rubric is None else json.loads(case.rubric.to_json())
        what = {"problem": case.problem.id, "unit": case.unit, "prompt": case.prompt.version, "rubric": rubric}
        return {**what, "messages": list(case.messages), **self._identity}


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


def _overrides(config: JudgeConfig) -> dict[Unit, JudgePrompt]:
    """The prompts that the config names; one that shows {rubric} is for marking checkpoints, another one is not."""
    names: dict[Unit, str | None] = {
        "trace": config.prompt,
        "prefix": config.prefix_prompt,
        "segment": config.segment_prompt,
    }
    return {unit: load_prompt(name, config.prompt_order) for unit, name in names.items() if name is not None}


def _answer_regex(rubric: Rubric | None) -> str:
    """Constrains an answer to the verdict alone."""
    if rubric is None:
        return SCORE_REGEX
    marks = "|".join(VALUES)
    return r"\n".join(f"Mark {number}: ({marks})" for number in range(1, len(rubric.checkpoints) + 1))


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
