"""What the policy wrote: token ids and log-probs as the sampling server returned them."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Trace:
    """One sampled response to one problem.

    `token_ids` holds the response alone (with the end-of-sequence token where one was sampled),
    `log_probs` the sampler's log-prob of each of them, at the sampling temperature.
    """

    problem_id: str
    sample: int
    """Place in its group, 0-based."""
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    text: str
    """The response decoded, special tokens left out."""
    finish_reason: str
    """`stop`, or `length` where max_new_tokens (or the context) ended it."""
    weight_versions: tuple[tuple[str, int, int], ...]
    """(version, first token, one past the last) for each stretch of tokens."""
    cached_tokens: int = field(default=0, compare=False)
    """Prompt tokens that the server need not read, as an earlier request had them."""

    @property
    def overlong(self) -> bool:
        """Whether the length limit ended the trace."""
        return self.finish_reason == "length"
