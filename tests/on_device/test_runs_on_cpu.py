"""The colocated run of tests/gpu, on a CPU."""

import pytest

from on_device.colocated import config_tree, stopped_and_resumed
from on_device.compared import failed


@pytest.mark.slow
def test_a_colocated_run_is_stopped_and_resumed(tmp_path):
    tree = config_tree(tmp_path / "run", cuda=False, layout={}, servers={})
    assert failed(stopped_and_resumed(tree, cuda=False)) == []
