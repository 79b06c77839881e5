"""`exprl train` with trainer and servers in turns on the same GPUs, stopped and resumed."""

import pytest
from on_device.colocated import config_tree, stopped_and_resumed

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.mark.parametrize(
    ("layout", "servers"),
    [
        pytest.param({}, {}, id="TP1"),
        pytest.param({"tp": 2, "pp": 2}, {"count": 2, "tp": 2}, marks=pytest.mark.gpus(4), id="TP2xPP2"),
    ],
)
def test_a_colocated_run_is_stopped_and_resumed(tmp_path, check, layout, servers):
    tree = config_tree(tmp_path / "run", cuda=True, layout=layout, servers=servers)
    check(stopped_and_resumed(tree, cuda=True))
