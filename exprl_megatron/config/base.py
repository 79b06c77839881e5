"""The base of all config classes: frozen, typed, and without unknown keys."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen, typed piece of the run's configuration; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    def violations(self, run_config: Any) -> list[str]:
        """Return a sentence for each contradiction of this section within `run_config`, the whole RunConfig."""
        return []
