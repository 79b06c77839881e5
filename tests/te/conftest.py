"""These tests run in .venv-te alone (`make test-te`): where Transformer Engine is, Megatron is another."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("transformer_engine") else ["test_*.py"]
