"""The sampling servers as judge: between sampling and the next sync they hold the judge's weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exprl_megatron.errors import ServerError
from exprl_megatron.serving.client import Generation
from exprl_megatron.serving.fleet import Fleet

LENT = "judge"
"""What the servers call the judge's weights."""


class LentServer:
    """What judging needs of a client, made of a fleet; `home` is the server that is asked as a rule.

    Answers are of the judge's weights alone: where a server has others by then, the judge's are brought again.
    """

    def __init__(self, fleet: Fleet, model: Path, home: int, deadline_s: float):
        self.name = f"policy-{home}"
        self.url = "lent to the judge"
        self._fleet = fleet
        self._model = model
        self._home = home
        self._deadline_s = deadline_s

    async def generate(self, input_ids: Sequence[int], **keywords: Any) -> Generation:
        """See SGLangClient and Fleet.ask."""
        while True:
            await self.bring()
            written = await self._fleet.ask(self._home, lambda client: client.generate(input_ids, **keywords))
            if {version for version, _, _ in written.weight_versions} <= {LENT}:
                return written

    async def bring(self) -> None:
        """Let the servers hold the judge's weights, if they do not."""
        await self._fleet.lend(self._model, LENT, self._deadline_s)

    async def health(self) -> None:
        """Return where a server serves, else raise ServerError."""
        if not self._fleet.serves:
            raise ServerError("No sampling server is there to judge.")
