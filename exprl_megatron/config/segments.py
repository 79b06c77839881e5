"""How traces are cut into segments, and which part of a trace the judge reads."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from exprl_megatron.config.base import Config


class SegmentsConfig(Config):
    """Where a new segment begins; spans are cut on the sampled token ids."""

    splitter: Literal["heading", "delimiter", "paragraph", "sentences", "released"] = "heading"
    """Before a line that begins with the delimiter; before the delimiter anywhere; at an empty line; every
    `sentences_per_segment` sentences; or, set by `reproduce: released`, after a token that ends in the delimiter."""
    delimiter: str = Field("###", min_length=1)
    """Text at the start of a segment, for the splitters `heading`, `delimiter` and `released`."""
    sentences_per_segment: PositiveInt = 4
    """Number of sentences of a segment, for the splitter `sentences`."""
    min_tokens: NonNegativeInt = 32
    """A shorter segment is joined to its neighbor; not used by `released`."""
    max_segments: PositiveInt | None = 10
    """Further segments are joined to the last; not used by `released`."""

    def max_count(self, tokens: int) -> int:
        """Return the maximum number of segments of a response of `tokens` tokens."""
        if self.splitter == "released":
            return tokens
        fitting = max(1, tokens // max(1, self.min_tokens))
        return min(fitting, self.max_segments or fitting)


class RouteConfig(Config):
    """How the traces of one domain are judged and credited."""

    granularity: Literal["trace", "prefix", "segment"]
    """The part of a trace in one question to the judge: the whole trace, a prefix of it, or a segment."""
    estimator: Literal["delta", "end", "group", "batch", "basic", "outcome"]
    """`outcome`: the whole trace's score, normalized within the group, on every token (with granularity `trace`)."""

    def violations(self, run_config) -> list[str]:
        if (self.granularity == "trace") != (self.estimator == "outcome"):
            return [
                f"a route has the granularity {self.granularity} and the estimator {self.estimator}; "
                "`outcome` needs `trace`."
            ]
        return []
