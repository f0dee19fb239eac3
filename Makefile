# FedForward. `make` alone shows what there is. Every target sets up .venv first if it is missing.
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint format bench clean

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

help:  ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# torch first and pinned, so that nothing that is installed after it brings another build.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

demo: $(READY)  ## Train the default experiment: 20 clients, digits, mono-forward
	$(BIN)/fedforward run

test: $(READY)  ## Run the fast tests (a few minutes on 2 cores)
	$(BIN)/python -m pytest -n auto

test-slow: $(READY)  ## Run the long tests (Flower's Ray runtime among them)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray]'
	$(BIN)/python -m pytest -m slow

lint: $(READY)  ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## Measure speed and memory beside hand-written loops: some ten minutes
	$(BIN)/fedforward bench $(BENCH)

clean:  ## Remove the environment and build products; runs stay
	rm -rf .venv build dist *.egg-info
