"""A judge that shares the sampling servers: they hold the judge's weights between sampling and the next weight sync."""

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from exprl_megatron.errors import ServerError
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.generation import Generation
from exprl_megatron.serving.server_pool import ServerPool

JUDGE_VERSION = "judge"
"""Weight version under which the servers hold the judge's weights."""


class SharedJudgeClient:
    """A client of the judge on the servers of `pool`; requests preferably go to server number `home`.

    Replies come from the judge's weights alone: where the policy's weights were loaded in the meantime, the judge's are
    loaded again. A server that holds other weights than it received has failed.
    """

    def __init__(self, pool: ServerPool, model: Path, home: int, deadline_s: float):
        self.name = f"policy-{home}"
        self.url = "shared with the judge"
        self._pool = pool
        self._model = model
        self._home = home
        self._deadline_s = deadline_s

    async def generate(self, input_ids: Sequence[int], **keywords: Any) -> Generation:
        """Generate as SGLangClient and ServerPool.ask do."""

        (generation,) = await self._generate(lambda client: _one(client.generate(input_ids, **keywords)))
        return generation

    async def generate_all(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], **keywords: Any
    ) -> list[Generation]:
        """Generate as SGLangClient and ServerPool.ask do."""
        return await self._generate(lambda client: client.generate_all(prompts, seeds, **keywords))

    async def _generate(self, ask: Callable[[SGLangClient], Awaitable[list[Generation]]]) -> list[Generation]:
        async def generate(client: SGLangClient) -> list[Generation]:
            generations = await ask(client)
            if not _by_judge(generations) and self._pool.version == JUDGE_VERSION:
                raise ServerError(f"{client.name} ({client.url}) did not generate under the judge's weights.")
            return generations

        while True:
            await self.load_weights()
            generations = await self._pool.ask(self._home, generate)
            if _by_judge(generations):
                return generations

    async def load_weights(self) -> None:
        """Load the judge's weights into the servers, unless they hold them."""
        await self._pool.load_judge_weights(self._model, JUDGE_VERSION, self._deadline_s)

    async def health(self) -> None:
        """Return if a server is healthy.

        Raises:
            ServerError: none is healthy.
        """
        if not self._pool.has_healthy:
            raise ServerError("No sampling server is available to judge; see the servers' logs.")


async def _one(generation: Awaitable[Generation]) -> list[Generation]:
    return [await generation]


def _by_judge(generations: Sequence[Generation]) -> bool:
    return {version for each in generations for version, _, _ in each.weight_versions} <= {JUDGE_VERSION}
