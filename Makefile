# make test: all tests, setting up the environment where needed.
# make check: what has to pass before each commit, in under a minute.
.PHONY: check format test setup
VENV ?= .venv
export OMNITUNE_VENV := $(VENV)
RUN := $(VENV)/bin/

test: setup
	$(RUN)pytest -q -m "not gpu and not exhaustive"

check: setup
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)mypy
	$(RUN)pytest -q -n 2 -m "not gpu and not exhaustive" tests/unit

format: setup
	$(RUN)ruff check --fix .
	$(RUN)ruff format .

setup:
	./launch.sh --setup
