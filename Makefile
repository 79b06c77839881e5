# The two commands of a newcomer are `make demo` and `make test`; each installs what is missing first.
export OMP_NUM_THREADS = 1
PYTEST = .venv/bin/python -m pytest
NOW := $(shell date +%Y%m%d-%H%M%S)

.PHONY: setup demo demo-smollm study test test-fast test-te test-gpu lint lock lock-te miniature

setup:
	@tools/setup.sh

demo: setup
	.venv/bin/exprl train recipes/configs/demo.yaml directory=runs/demo-$(NOW)

demo-smollm: setup
	.venv/bin/python tools/prepare_smollm.py
	.venv/bin/python tools/prepare_data.py gsm8k --out build/gsm8k.jsonl
	.venv/bin/exprl train recipes/configs/demo-smollm.yaml directory=runs/demo-smollm-$(NOW)

study: setup
	.venv/bin/python tools/study.py

test: setup
	$(PYTEST) -m "not gpu"

test-fast: setup
	$(PYTEST) -m "not gpu and not slow"

# In an environment of its own (.venv-te), with Transformer Engine and no GPU.
test-te: setup
	@tools/setup_te.sh
	.venv-te/bin/python -m pytest tests/te

# On a machine with a CUDA device, in the environment of the Dockerfile; ends with a table.
test-gpu:
	python3 -m pytest -m gpu tests/gpu

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

miniature: setup
	.venv/bin/python tools/make_miniature.py

lock: setup
	build/uv/bin/uv pip compile setup.py requirements/cpu.in --extra launch --extra examples --extra dev \
	    --python-version 3.12 --excludes requirements/cpu-excludes.txt --no-header --generate-hashes --quiet \
	    --output-file requirements/cpu.txt

lock-te: setup
	build/uv/bin/uv pip compile requirements/te.in --constraints requirements/cpu.txt --python-version 3.12 \
	    --no-header --generate-hashes --quiet --output-file requirements/te.txt
