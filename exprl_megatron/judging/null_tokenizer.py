"""A stand-in for the tokenizer of a judge behind a closed API, whose tokenizer is not public."""

from collections.abc import Mapping, Sequence

from exprl_megatron.judging.prompt import PromptFrame
from exprl_megatron.utils.token_ids import TokenIds


class NullTokenizer:
    """Replaces JudgeTokenizer: no prompt has tokens here, and the API itself refuses prompts that are too long."""

    def prompt_ids(self, messages: Sequence[Mapping[str, str]]) -> TokenIds:
        """Return no tokens."""
        return TokenIds()

    def batch_prompt_ids(self, frame: PromptFrame, traces: Sequence[str]) -> list[TokenIds]:
        """Return no tokens for each of `traces`."""
        return [TokenIds() for _ in traces]
