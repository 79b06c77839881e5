"""Scores traces by a server with the weights of the reference policy, for the KL term."""

from collections.abc import Sequence

import numpy as np

from exprl_megatron.algorithms.batch import SampleOrOutline, TrainSample
from exprl_megatron.errors import ServerError
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.ready import wait_ready
from exprl_megatron.utils.together import gather_or_cancel
from exprl_megatron.weight_sync.coordinator import RankCoordinator
from exprl_megatron.weight_sync.sync import WeightSync


class RefScorer:
    """Client of the reference policy's server. Every rank calls the same methods; only rank 0 talks to the server."""

    def __init__(self, client: SGLangClient, sync: WeightSync, coordinator: RankCoordinator, start_deadline_s: float):
        self._client = client
        self._sync = sync
        self._coordinator = coordinator
        self._start_deadline_s = start_deadline_s
        self._version: str | None = None

    def open(self) -> None:
        """Open the connection and wait until the server is ready.

        Raises:
            ServerError: the server does not start.
        """
        self._coordinator.broadcast_run(lambda: self._open())

    def begin_stage(self, stage: str) -> None:
        """Push the policy's current weights to the server; they stay there until the next stage.

        A run that resumes within `stage` must call this before it loads the checkpoint.

        Raises:
            ServerError: see WeightSync.push_weights.
        """
        self._version = f"ref-{stage}"
        self._sync.push_weights(self._version)

    def log_probs(self, samples: Sequence[SampleOrOutline]) -> list[np.ndarray]:
        """Compute the log-probs [response tokens] of each sample at temperature 1; returns the same on every rank.

        The result is that of Policy.log_probs(ref_policy=True), float32. All requests are in flight at the same time:
        the server's scheduler runs as many as fit, and each has the full request deadline.

        Raises:
            ServerError: the server is dead, does not answer within its deadline, refuses, or has other weights.
        """
        return self._coordinator.broadcast_run(lambda: gather_or_cancel(map(self._score, samples)))

    def close(self) -> None:
        """Disconnect from the server."""
        self._sync.close()
        self._coordinator.broadcast_run(lambda: self._client.__aexit__())

    async def _open(self) -> None:
        await self._client.__aenter__()
        await wait_ready(self._client, self._start_deadline_s)

    async def _score(self, sample: SampleOrOutline) -> np.ndarray:
        if not isinstance(sample, TrainSample):
            raise TypeError("rank 0 scores complete samples, and this is an outline")
        scores = await self._client.score(sample.token_ids, sample.prompt_tokens)
        if scores.weight_version != self._version:
            raise ServerError(
                f"{self._client.name} ({self._client.url}) scored under weight version {scores.weight_version}, "
                f"not {self._version}."
            )
        return scores.log_probs
