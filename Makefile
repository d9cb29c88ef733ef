# `make serve` and `make test` do everything a fresh machine needs; their second run installs nothing.

# The first interpreter that is new enough; `make PYTHON=/path/to/python3.12 ...` chooses another.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: setup serve test lint format clean

setup: $(STAMP)

# The C kernels too: an editable install builds them where there is a compiler.
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard kernels/tolkernels/cpu/*)
	@test -n "$(PYTHON)" || { echo "tolserve needs Python 3.11 or later; give it as PYTHON=/path/to/python" >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# Options go through ARGS: make serve ARGS='--port 8080 --device-cache 100%'
serve: setup
	$(BIN)/tolserve serve $(ARGS)

# Options go through ARGS here too: make test ARGS='tests/tol -x'
test: setup
	$(BIN)/python -m pytest $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build kernels/tolkernels/_cpu*.so
