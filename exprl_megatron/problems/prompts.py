"""From a problem's text to the token ids that the policy continues."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from exprl_megatron.config.problems import PromptConfig
from exprl_megatron.errors import UserError
from exprl_megatron.problems.problem import Problem


class PromptBuilder:
    """Puts a problem's text into the chat template of the policy's tokenizer.

    It takes text and never a Problem, so that no reference can reach it. `tokenizer` is a Hugging
    Face tokenizer. Raises UserError where that has no chat template.
    """

    def __init__(self, tokenizer: Any, config: PromptConfig):
        if not tokenizer.chat_template:
            raise UserError(
                f"The tokenizer in {tokenizer.name_or_path} has no chat template; add chat_template.jinja to it."
            )
        self._tokenizer = tokenizer
        self._config = config

    def token_ids(self, text: str) -> tuple[int, ...]:
        """The prompt with the opening of the assistant's turn at its end."""
        return chat_token_ids(self._tokenizer, self._config, self._config.user.replace("{problem}", text))


def chat_token_ids(tokenizer: Any, config: PromptConfig, user: str) -> tuple[int, ...]:
    """The chat of the config's system message and the user message `user`, with the assistant's turn opened."""
    messages = [{"role": "user", "content": user}]
    if config.system is not None:
        messages.insert(0, {"role": "system", "content": config.system})
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False, **config.template_args
    )
    return tuple(ids)


@dataclass(frozen=True)
class PromptedProblems:
    """Problems that are short enough, each with its prompt (same order), and how many were not."""

    problems: tuple[Problem, ...]
    prompts: tuple[tuple[int, ...], ...]
    dropped: int

    def __len__(self) -> int:
        return len(self.problems)


def check_vocabulary(model: str, size: int, prompts: Sequence[Sequence[int]]) -> None:
    """Raise UserError where a prompt holds a token that the model does not have: it would end the server."""
    largest = max(max(ids) for ids in prompts)
    if largest >= size:
        raise UserError(
            f"The tokenizer in {model} gives token {largest}, but its model has {size} tokens; use the model's own."
        )


def drop_overlong(problems: Sequence[Problem], builder: PromptBuilder, max_tokens: int) -> PromptedProblems:
    """Leave out the problems whose prompt is longer than `max_tokens`; UserError where none is left."""
    prompted = [(problem, builder.token_ids(problem.statement)) for problem in problems]
    kept = [(problem, ids) for problem, ids in prompted if len(ids) <= max_tokens]
    if not kept:
        shortest = min((len(ids) for _, ids in prompted), default=0)
        raise UserError(
            f"None of the {len(prompted)} problems has a prompt of at most {max_tokens} tokens (the shortest has "
            f"{shortest}); raise max_prompt_tokens or policy.max_tokens, or lower sampling.max_new_tokens."
        )
    return PromptedProblems(
        problems=tuple(problem for problem, _ in kept),
        prompts=tuple(ids for _, ids in kept),
        dropped=len(prompted) - len(kept),
    )
