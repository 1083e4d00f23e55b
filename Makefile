# make check: what has to pass before each commit, in about five minutes on two cores; sets up the environment where needed.
# make test: the same, and the tests that run real processes.
.PHONY: check format test setup
VENV ?= .venv
export OMNITUNE_VENV := $(VENV)
RUN := $(VENV)/bin/
TESTS := OMP_NUM_THREADS=1 $(RUN)pytest -q -n 2 -m "not gpu and not exhaustive"

test: check
	$(TESTS) --dist loadfile --no-loadscope-reorder tests/end_to_end

check: setup
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)mypy
	$(TESTS) tests/unit

format: setup
	$(RUN)ruff check --fix .
	$(RUN)ruff format .

setup:
	./launch.sh --setup
