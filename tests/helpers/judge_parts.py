"""What the judge's tests share: a tokenizer of words, a problem, and a client whose answers are written out."""

import asyncio
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from exprl_megatron.config.judging import JudgeConfig
from exprl_megatron.errors import ServerError
from exprl_megatron.judging.judge import Judge
from exprl_megatron.problems.problem import Problem, Reference
from helpers.clock import pass_time

PROMPT = Path(__file__).parent / "plain_prompt.md"
SPECIAL = ["<unk>", "<|start|>", "<|end|>"]
WORDS = [*SPECIAL, "user", "judge", "REF", "TR", "JUDGE", "1", "2", "3", "4", "5", "+", "=", "###", "Score:"]
UNKNOWN = 10_000
"""An id that the tokenizer of words does not know, so that any text may be its text."""
TEMPLATE = (
    "{% for m in messages %}<|start|> {{ m['role'] }} {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|start|> judge{% endif %}"
)
PROBLEM = Problem("p1", "1 + 1", Reference("### 1 + 1 = 2"), "2")


@dataclass
class Written:
    """What SGLangClient.generate returns, as far as judging reads it."""

    text: str
    finish_reason: str = "stop"
    token_ids: tuple[int, ...] = (UNKNOWN,)
    watched_log_probs: tuple[tuple[float, ...], ...] = ()


class Scripted:
    """Answers, after `pause` seconds, with the next of `script`: a text, something Written, or an exception.

    With `late` every deadline of at most 10 s passes before it answers.
    With `well` it says to be in health.
    """

    def __init__(self, *script, pause=0.0, well=False, late=False):
        self.script = list(script)
        self.pause, self.late = pause, late
        self.well = well
        self.name, self.url = "judge-0", "http://nowhere"
        self.calls = []
        self.running = self.most_running = 0

    async def generate(self, input_ids, **sampling):
        self.calls.append((list(input_ids), sampling))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            answer = self.script.pop(0)
            if self.late:
                pass_time()
            await asyncio.sleep(60 if self.late else self.pause)
        finally:
            self.running -= 1
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, Written) else Written(str(answer))

    async def generate_all(self, prompts, seeds, **sampling):
        """Return the next answers of the script; the first exception among them is the request's."""
        pairs = zip(prompts, seeds, strict=True)
        answers = await asyncio.gather(
            *(self.generate(ids, seed=seed, **sampling) for ids, seed in pairs), return_exceptions=True
        )
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers

    async def health(self):
        if not self.well:
            raise ServerError("judge-0 is not well")


def word_tokenizer():
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", chat_template=TEMPLATE)
    tokenizer.add_tokens([AddedToken(name, special=True) for name in SPECIAL], special_tokens=True)
    return tokenizer


def words(ids):
    return " ".join(WORDS[i] for i in ids)


def make_judge(*clients, context_tokens=64, store=None, **config):
    settings = {"model": "judge", "prompt": str(PROMPT), "max_new_tokens": 8, "retry_pause_s": 0.01} | config
    return Judge(JudgeConfig(**settings), clients, word_tokenizer(), context_tokens, store)


def verdict(client, text="### 1 + 1 = 2", **config):
    return asyncio.run(make_judge(client, **config).grade(PROBLEM, text))
