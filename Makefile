# Everything a person or CI runs. Both main commands make and use .venv.
#   make demo    set up, build the demo bank, serve it, answer under three preferences, keep serving
#   make test    set up, run the tests
.PHONY: demo bank test lint format check examples wheel bench gpu setup-demo setup-dev clean

PYTHON := .venv/bin/python
BANK ?= .cache/demo-bank
PORT ?= 8000

setup-demo:
	@scripts/setup demo

setup-dev:
	@scripts/setup dev demo

demo: setup-demo
	@$(PYTHON) examples/dictionary/demo.py --bank $(BANK) --port $(PORT)

# The last line printed is the bank's folder.
bank:
	@scripts/setup demo >&2
	@$(PYTHON) examples/dictionary/bank.py --bank $(BANK)

test: setup-dev
	@$(PYTHON) -m pytest

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

gpu: setup-dev
	$(PYTHON) -m pytest -m gpu
	$(PYTHON) -m benchmarks.merge --device cuda
	$(PYTHON) -m benchmarks.serve --device cuda

clean:
	rm -rf .venv .cache build dist .pytest_cache .mypy_cache .ruff_cache
