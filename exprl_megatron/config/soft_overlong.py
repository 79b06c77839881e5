"""The penalty for traces close to the length limit."""

from pydantic import Field, PositiveInt

from exprl_megatron.config.base import Config


class SoftOverlongConfig(Config):
    """DAPO's soft overlong punishment (arXiv 2503.14476, equation 13): traces lose score before they are cut off."""

    max_length: PositiveInt | None = None
    """L_max, the length from which on the full penalty applies; None: sampling.max_new_tokens."""
    cache: PositiveInt | None = None
    """L_cache: the penalty starts this many tokens below max_length and grows linearly (verl's overlong_buffer.len).
    None: a fifth of max_length, as the paper has 4,096 of 20,480."""
    penalty: float = Field(0.5, gt=0)
    """The full penalty, in units of scores, which are 0 to 1. The paper's is 1 where right answers have 1 and wrong
    ones -1: half of the distance between them."""

    def lengths(self, max_new_tokens: int) -> tuple[int, int]:
        """Return (L_max, L_cache) for traces of at most `max_new_tokens` tokens."""
        longest = self.max_length or max_new_tokens
        return longest, self.cache or max(1, longest // 5)

    def faults(self, stage: str, max_new_tokens: int) -> list[str]:
        """Return a sentence for each contradiction with the stage's sampling."""
        longest, cache = self.lengths(max_new_tokens)
        found = []
        if longest > max_new_tokens:
            found.append(
                f"stage {stage}: soft_overlong.max_length is {longest}, but no trace has more than "
                f"sampling.max_new_tokens ({max_new_tokens}), so that none would be punished in full; lower it."
            )
        if cache > longest:
            found.append(
                f"stage {stage}: soft_overlong.cache is {cache}, more than the {longest} tokens of the longest trace "
                "that is not punished in full (soft_overlong.max_length, or sampling.max_new_tokens); lower it."
            )
        return found
