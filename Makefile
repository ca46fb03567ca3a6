# Everything a person or CI runs. Both main commands make and use .venv.
#   make demo    set up, build the demo bank, serve it, answer under three preferences, keep serving
#   make test    set up, run the tests
# vLLM has environments of its own, .venv-vllm-VERSION: `make test-vllm`, `make bench-vllm`.
.PHONY: demo bank study test test-vllm lint format check examples wheel bench bench-vllm gpu setup-demo \
	setup-dev clean

PYTHON := .venv/bin/python
BANK ?= .cache/demo-bank
PORT ?= 8000
# What `make bench-vllm` measures on a CPU, and what `make gpu` installs on a GPU machine.
VLLM ?= 0.32.0
VLLM_GPU ?= 0.33.0
VLLM_PYTHON := .venv-vllm-$(VLLM)/bin/python
VLLM_GPU_PYTHON := .venv-vllm-$(VLLM_GPU)-cuda/bin/python

setup-demo:
	@scripts/setup demo

setup-dev:
	@scripts/setup dev demo experiments

demo: setup-demo
	@$(PYTHON) examples/dictionary/demo.py --bank $(BANK) --port $(PORT)

# What merging and calibration gain, measured: docs/quality.md. Hours on two cores; goes on where it stopped.
study: setup-dev
	@scripts/study

# The last line printed is the bank's folder.
bank:
	@scripts/setup demo >&2
	@$(PYTHON) examples/dictionary/bank.py --bank $(BANK)

test: setup-dev
	@$(PYTHON) -m pytest

# All in the newest vLLM that runs on a CPU, some in the oldest that is supported.
test-vllm:
	@scripts/vllm/test

lint: setup-dev
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

format: setup-dev
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

examples: setup-dev
	@$(PYTHON) scripts/run_examples.py

wheel: setup-dev
	scripts/check_wheel

check: lint test examples

bench: setup-dev
	$(PYTHON) -m benchmarks.merge
	$(PYTHON) -m benchmarks.serve
	$(PYTHON) -m benchmarks.experiments

bench-vllm:
	@scripts/setup_vllm $(VLLM)
	$(VLLM_PYTHON) -m benchmarks.vllm

gpu: setup-dev
	@scripts/setup_vllm $(VLLM_GPU) cuda
	$(PYTHON) -m pytest -m gpu
	$(VLLM_GPU_PYTHON) -m pytest -m vllm tests/engines/vllm tests/server/vllm tests/contract
	$(PYTHON) -m benchmarks.merge --device cuda
	$(PYTHON) -m benchmarks.serve --device cuda
	$(VLLM_GPU_PYTHON) -m benchmarks.vllm

clean:
	rm -rf .venv .venv-vllm-* .cache build dist .pytest_cache .mypy_cache .ruff_cache
