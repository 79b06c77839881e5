"""Prompts of a judge behind a closed API, whose tokenizer nobody has."""

from collections.abc import Mapping, Sequence

from exprl_megatron.judging.prompt import PromptFrame
from exprl_megatron.utils.token_ids import TokenIds


class UncountedPrompts:
    """Takes the place of JudgeTokenizer: no prompt has tokens here, and the API itself refuses what is too long."""

    def request(self, messages: Sequence[Mapping[str, str]]) -> TokenIds:
        """Return no tokens."""
        return TokenIds()

    def requests(self, frame: PromptFrame, traces: Sequence[str]) -> list[TokenIds]:
        """Return no tokens for each of `traces`."""
        return [TokenIds() for _ in traces]
