# Everything here makes its own virtual environment in .venv first; nothing but Python 3.11+ is needed.
PYTHON ?= python3
PORT ?= 8501
RUN := .venv/bin/python

.PHONY: demo test test-long lint sample-runs clean

demo:
	@$(PYTHON) -m app demo --port $(PORT)

# Two processes of one thread each; a browser wants the machine for itself.
test: .venv-dev lint
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not long and not browser" -n 2 --dist loadfile -rs
	@$(RUN) -m pytest -m "browser and not long" -rs

test-long: .venv-dev lint
	@$(RUN) -m pytest -rs --hypothesis-profile=long

lint: .venv-dev
	@$(RUN) -m ruff check --quiet .
	@$(RUN) -m ruff format --check --quiet .
	@.venv/bin/lint-imports >/dev/null || .venv/bin/lint-imports

sample-runs: .venv-dev
	@$(RUN) sample_runs/record.py

.PHONY: .venv-dev
.venv-dev:
	@$(PYTHON) -m app.bootstrap dev

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache
