# The two commands of a newcomer are `make demo` and `make test`; each installs what is missing first.
export OMP_NUM_THREADS = 1
PYTEST = .venv/bin/python -m pytest
NOW := $(shell date +%Y%m%d-%H%M%S)

.PHONY: setup demo demo-smollm study test test-fast lint lock miniature

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

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

miniature: setup
	.venv/bin/python tools/make_miniature.py

lock: setup
	build/uv/bin/uv pip compile setup.py requirements/cpu.in --extra launch --extra examples --extra dev \
	    --python-version 3.12 --excludes requirements/cpu-excludes.txt --no-header --generate-hashes --quiet \
	    --output-file requirements/cpu.txt
