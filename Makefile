# make check: what has to pass before each commit, in under a minute; sets up the environment where needed.
# make test: the same, and the tests that run real processes.
.PHONY: check format test setup
VENV ?= .venv
export OMNITUNE_VENV := $(VENV)
RUN := $(VENV)/bin/
USUAL := "not gpu and not exhaustive"

test: check
	$(RUN)pytest -q -m $(USUAL) tests/end_to_end

check: setup
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)mypy
	$(RUN)pytest -q -n 2 -m $(USUAL) tests/unit

format: setup
	$(RUN)ruff check --fix .
	$(RUN)ruff format .

setup:
	./launch.sh --setup
