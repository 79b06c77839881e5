"""A server computes with the threads of its own environment, also where it is forked from a process with others."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from exprl_megatron.serving import keyed_server
from exprl_megatron.serving.keys import KEY_FILE


@pytest.fixture
def served(monkeypatch, tmp_path):
    """What SGLang would start with: its arguments, and the threads of the process."""
    found = []

    def run_server(arguments):
        found.append((arguments, torch.get_num_threads()))

    contents = {
        "sglang.launch_server": {"run_server": run_server},
        "sglang.srt.plugins": {"load_plugins": lambda: None},
        "sglang.srt.server_args": {"prepare_server_args": lambda words: SimpleNamespace(words=words)},
        "sglang.srt.utils": {"kill_process_tree": lambda *_, **__: None},
    }
    for name in ("sglang", "sglang.srt", *contents):
        module = ModuleType(name)
        vars(module).update(contents.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
    key = tmp_path / "key"
    key.write_text("secret")
    key.chmod(0o600)
    monkeypatch.setenv(KEY_FILE, str(key))
    before = torch.get_num_threads()
    yield found
    torch.set_num_threads(before)


def test_a_forked_server_takes_the_threads_of_its_environment(served, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    keyed_server.main()
    monkeypatch.delenv("OMP_NUM_THREADS")
    keyed_server.main()
    assert [threads for _, threads in served] == [3, 3]
    assert served[0][0].api_key == "secret"
