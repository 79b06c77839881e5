"""A frozen server that knows a stage's starting weights and scores traces under them, for the KL term."""

from collections.abc import Sequence as ListLike

import numpy as np

from exprl_megatron.algorithms.batch import LearnedFrom, Sequence
from exprl_megatron.errors import ServerError
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.ready import wait_ready
from exprl_megatron.utils.together import together
from exprl_megatron.weight_sync.conductor import Conductor
from exprl_megatron.weight_sync.sync import WeightSync


class StartScorer:
    """Every rank calls the same methods; the conductor alone talks to the server, between `open` and `close`."""

    def __init__(self, client: SGLangClient, sync: WeightSync, conductor: Conductor, start_deadline_s: float):
        self._client = client
        self._sync = sync
        self._conductor = conductor
        self._start_deadline_s = start_deadline_s
        self._version: str | None = None

    def open(self) -> None:
        """Open the connection and wait until the server is ready. Raises ServerError where it does not become so."""
        self._conductor.everywhere(lambda: self._conductor.run(self._open()))

    def begin_stage(self, stage: str) -> None:
        """Bring the policy's current weights to the server; they stay there until the next stage.

        A run that resumes within `stage` must call this before it loads the checkpoint. Raises as WeightSync.bring.
        """
        self._version = f"start-{stage}"
        self._sync.bring(self._version)

    def log_probs(self, sequences: ListLike[LearnedFrom]) -> list[np.ndarray]:
        """Of every response token at temperature 1, as Policy.log_probs(start=True); the same on every rank.

        All requests are under way at once, as in sampling: the server's own scheduler takes as many as it has room
        for, and each has the whole of the request deadline. Raises ServerError where the server is dead, hangs past
        its deadline, refuses, or holds other weights.
        """
        return self._conductor.everywhere(lambda: self._conductor.run(together(map(self._score, sequences))))

    def close(self) -> None:
        """Leave the server."""
        self._sync.close()
        self._conductor.everywhere(lambda: self._conductor.run(self._client.__aexit__()))

    async def _open(self) -> None:
        await self._client.__aenter__()
        await wait_ready(self._client, self._start_deadline_s)

    async def _score(self, sequence: Sequence) -> np.ndarray:
        scores = await self._client.score(sequence.token_ids, sequence.prompt_tokens)
        if scores.weight_version != self._version:
            raise ServerError(
                f"{self._client.name} ({self._client.url}) scored under weight version {scores.weight_version}, "
                f"not {self._version}."
            )
        return scores.log_probs
