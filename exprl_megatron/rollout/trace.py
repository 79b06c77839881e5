"""A sampled response: token ids and log-probs as the sampling server returned them."""

from dataclasses import dataclass, field

import numpy as np

from exprl_megatron.utils.array_fields import ArrayFields
from exprl_megatron.utils.routed_experts_array import routed_experts_array


@dataclass(frozen=True, eq=False)
class Trace(ArrayFields):
    """One sampled response to one problem (slime and verl: a rollout or response; TRL: a completion).

    `token_ids` has the tokens of the response, with the end-of-sequence token if one was sampled; `log_probs` has the
    log-prob of each of them as the server reported it, at the sampling temperature. Array-likes are converted.
    """

    problem_id: str
    sample: int
    """Number of the trace in its group, from 0."""
    prompt_ids: np.ndarray
    """[prompt tokens], int32."""
    token_ids: np.ndarray
    """[tokens], int32."""
    log_probs: np.ndarray
    """[tokens], float32."""
    text: str
    """The decoded response without special tokens."""
    finish_reason: str
    """`stop`, or `length` where max_new_tokens (or the context) ended it."""
    weight_versions: tuple[tuple[str, int, int], ...]
    """(weight version, first token, one past the last) for each span of tokens."""
    cached_tokens: int = field(default=0, compare=False)
    """Prompt tokens that the server found in its prefix cache."""
    routed_experts: np.ndarray | None = None
    """[prompt tokens + tokens - 1, layers, top_k], uint8 or int16: the experts that the server chose (router replay).
    None: they were not requested."""

    def __post_init__(self) -> None:
        self._hold(np.int32, "prompt_ids", "token_ids")
        self._hold(np.float32, "log_probs")
        tokens = len(self.prompt_ids) + len(self.token_ids)
        object.__setattr__(self, "routed_experts", routed_experts_array(self.routed_experts, tokens))

    @property
    def overlong(self) -> bool:
        """Whether the length limit ended the trace."""
        return self.finish_reason == "length"
