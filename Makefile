# The two commands of a newcomer are `make demo` and `make test`; each installs what is missing first.
export OMP_NUM_THREADS = 1
PYTEST = .venv/bin/python -m pytest
# Files of tests that run side by side; each may have servers and trainer processes of about 6 GB.
JOBS ?= 2
SIDE_BY_SIDE = -n $(JOBS) --dist loadfile --no-loadscope-reorder
NOW := $(shell date +%Y%m%d-%H%M%S)

.PHONY: setup browser demo demo-smollm study chaos test test-fast test-te test-slurm test-gpu lint types ratchet docs reference lock lock-te lock-gpu miniature bench-peer lock-peer

setup:
	@tools/setup.sh

# For the tests of the page that `exprl report` makes.
browser: setup
	@tools/setup_browser.sh

demo: setup
	.venv/bin/exprl train recipes/configs/demo.yaml directory=runs/demo-$(NOW)

demo-smollm: setup
	.venv/bin/python tools/prepare_smollm.py
	.venv/bin/python tools/prepare_data.py gsm8k-test --out build/gsm8k-test.jsonl
	.venv/bin/exprl train recipes/configs/demo-smollm.yaml directory=runs/demo-smollm-$(NOW)

study: setup
	.venv/bin/python tools/study.py

# Each kind of fault once, then two hundred at random in one long miniature run; ends with a table.
chaos: setup
	$(PYTEST) -m chaos
	.venv/bin/python tools/chaos.py directory=runs/chaos-$(NOW)

test: setup browser
	$(PYTEST) $(SIDE_BY_SIDE) -m "not gpu and not chaos"

test-fast: setup
	$(PYTEST) $(SIDE_BY_SIDE) -m "not gpu and not slow"

# In an environment of its own (.venv-te), with Transformer Engine and no GPU.
test-te: setup
	@tools/setup_te.sh
	.venv-te/bin/python -m pytest tests/te

# Compares a whole RL step with TRL's, in an environment of its own (.venv-peer); at most 8 minutes on two quiet cores.
bench-peer: setup
	@tools/setup_peer.sh
	.venv/bin/python tools/bench_peer.py

# On a Slurm of two nodes that is started on this machine; needs root, installs Slurm's packages.
test-slurm: setup
	@tools/slurm_local.sh install
	$(PYTEST) -m slurm tests/slurm

# On a machine with CUDA devices, in the environment of the Dockerfile: at most 8 minutes on one GPU, and more tests on
# two to five. Ends with a table, in which a test that needs more GPUs is a row.
test-gpu:
	python3 -m pytest -m gpu --timeout 300 --durations 0 --durations-min 1 tests/gpu

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python tools/lint_words.py

types: setup
	.venv/bin/python tools/lint_types.py

# Records the words and type errors that are left in each package, where their sums have not risen.
ratchet: setup
	.venv/bin/python tools/lint_words.py --update
	.venv/bin/python tools/lint_types.py --update

# The documentation as a site: build/docs/index.html. A warning, such as a broken link, is an error.
docs: setup
	.venv/bin/python -m sphinx -q -b html -W --keep-going docs build/docs

# docs/config_keys.md from the classes of the config, docs/metrics.md from tools/metric_names.py.
reference: setup
	.venv/bin/python tools/make_reference.py

miniature: setup
	.venv/bin/python tools/make_miniature.py

lock: setup
	build/uv/bin/uv pip compile setup.py requirements/cpu.in --extra launch --extra examples --extra dev \
	    --python-version 3.12 --excludes requirements/cpu-excludes.txt --no-header --generate-hashes --quiet \
	    --output-file requirements/cpu.txt

lock-te: setup
	build/uv/bin/uv pip compile requirements/te.in --constraints requirements/cpu.txt --python-version 3.12 \
	    --no-header --generate-hashes --quiet --output-file requirements/te.txt

lock-gpu: setup
	build/uv/bin/uv pip compile setup.py requirements/gpu.in --extra gpu --extra launch --extra dev \
	    --constraints requirements/cpu.txt --overrides requirements/gpu-overrides.txt \
	    --no-emit-package transformer-engine-torch --python-version 3.12 --no-header --generate-hashes --quiet \
	    --output-file requirements/gpu.txt

lock-peer: setup
	build/uv/bin/uv pip compile requirements/peer.in --constraints requirements/cpu.txt --python-version 3.12 \
	    --no-header --generate-hashes --quiet --output-file requirements/peer.txt
