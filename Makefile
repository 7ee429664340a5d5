# make demo and make test set up a virtual environment of their own and need nothing installed but Python 3.11+.
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/demo
CLAIMS ?= --quick
BIN = $(VENV)/bin
export RAY_USAGE_STATS_ENABLED = 0
export FLWR_TELEMETRY_ENABLED = 0
export HF_HUB_OFFLINE = 1
export OMP_NUM_THREADS = 1

.PHONY: demo test fast lint claims
demo: $(VENV)/ready
	$(BIN)/fedsim demo --out $(OUT)

test: $(VENV)/ready
	$(BIN)/python -m pytest -q

fast: $(VENV)/ready
	$(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

claims: $(VENV)/ready
	$(BIN)/python -m experiments.claims $(CLAIMS)

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@
