"""The sampling servers as judge: between sampling and the next sync they hold the judge's weights."""

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from exprl_megatron.errors import ServerError
from exprl_megatron.serving.client import Generation, SGLangClient
from exprl_megatron.serving.fleet import Fleet

LENT = "judge"
"""What the servers call the judge's weights."""


class LentServer:
    """What judging needs of a client, made of a fleet; `home` is the server that is asked as a rule.

    Answers are of the judge's weights alone. Where the policy's were loaded meanwhile, the judge's are loaded again;
    a server that has others than it was given has failed.
    """

    def __init__(self, fleet: Fleet, model: Path, home: int, deadline_s: float):
        self.name = f"policy-{home}"
        self.url = "shared with the judge"
        self._fleet = fleet
        self._model = model
        self._home = home
        self._deadline_s = deadline_s

    async def generate(self, input_ids: Sequence[int], **keywords: Any) -> Generation:
        """See SGLangClient and Fleet.ask."""

        (generation,) = await self._written(lambda client: _one(client.generate(input_ids, **keywords)))
        return generation

    async def generate_all(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], **keywords: Any
    ) -> list[Generation]:
        """See SGLangClient and Fleet.ask."""
        return await self._written(lambda client: client.generate_all(prompts, seeds, **keywords))

    async def _written(self, ask: Callable[[SGLangClient], Awaitable[list[Generation]]]) -> list[Generation]:
        async def written(client: SGLangClient) -> list[Generation]:
            generations = await ask(client)
            if not _by_judge(generations) and self._fleet.version == LENT:
                raise ServerError(f"{client.name} ({client.url}) does not judge under the judge's weights.")
            return generations

        while True:
            await self.bring()
            generations = await self._fleet.ask(self._home, written)
            if _by_judge(generations):
                return generations

    async def bring(self) -> None:
        """Let the servers hold the judge's weights, if they do not."""
        await self._fleet.lend(self._model, LENT, self._deadline_s)

    async def health(self) -> None:
        """Return where a server serves, else raise ServerError."""
        if not self._fleet.serves:
            raise ServerError("No sampling server is there to judge.")


async def _one(generation: Awaitable[Generation]) -> list[Generation]:
    return [await generation]


def _by_judge(generations: Sequence[Generation]) -> bool:
    return {version for each in generations for version, _, _ in each.weight_versions} <= {LENT}
