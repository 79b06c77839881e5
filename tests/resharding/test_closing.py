"""A run that is over leaves its servers; one that died after the last sync costs it neither its end nor a thread."""

import asyncio
from types import SimpleNamespace

import pytest

from exprl_megatron.config.serving import SyncConfig
from exprl_megatron.errors import ServerError
from exprl_megatron.resharding import direct, weight_groups
from exprl_megatron.resharding.direct import DirectTransport
from exprl_megatron.resharding.weight_groups import WeightGroups
from exprl_megatron.training.sync import WeightSync

GROUP = object()


class Gone:
    """A server that takes no connection any more."""

    name = "policy-0"

    async def begin_weight_update(self):
        raise ServerError("policy-0 is gone")

    async def destroy_weights_group(self, name):
        raise ServerError("policy-0 is gone")


class Conductor:
    here = True

    def collective(self, conducting, following):
        conducting()

    def run(self, coroutine):
        return asyncio.run(coroutine)


def direct_with_a_group() -> DirectTransport:
    transport = DirectTransport([Gone()], 1, None, None, 1.0)
    transport._group = GROUP
    return transport


def broadcasts_with_a_group():
    groups = WeightGroups(1, None, None, 1.0)
    groups.names, groups._group, groups._thread = ["group"], GROUP, SimpleNamespace(stop=lambda: None)
    return SimpleNamespace(close=lambda: groups.close([Gone()]), follow_close=None)


@pytest.mark.parametrize(
    ("module", "transport"), [(direct, direct_with_a_group), (weight_groups, broadcasts_with_a_group)]
)
def test_a_run_whose_server_died_after_the_last_sync_ends_well_and_aborts_the_group(monkeypatch, module, transport):
    aborted = []
    monkeypatch.setattr(module, "destroy", lambda group, deadline_s: None)
    monkeypatch.setattr(module, "abort", aborted.append, raising=False)
    WeightSync(SyncConfig(), None, Conductor(), None, transport(), None).close()
    assert aborted == [GROUP], "what waits for the server is freed"


def test_another_fault_at_the_end_is_raised():
    async def close():
        raise ValueError("a fault of ours")

    with pytest.raises(ValueError, match="of ours"):
        WeightSync(SyncConfig(), None, Conductor(), None, SimpleNamespace(close=close, follow_close=None), None).close()
