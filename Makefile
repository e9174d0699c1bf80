# Two commands: `make demo` and `make test`. Both set up what they need in .venv.
# `make test ALL=1`, which CI runs, leaves out nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread per process: the curves are small, and threads would fight over the cores.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test check docs setup setup-dev benchmarks clean

demo: setup
	$(BIN)/dsnet-bluesky demo

test: setup-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(if $(ALL),,-m "not faults and not slow")
	$(if $(ALL),,@echo "Left out: tests marked slow, and faults, which kill processes and fill disks. make test ALL=1 runs them too, as CI does.")

check: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright
	$(MAKE) docs

# Into docs/_build/html; any warning is an error, and so is an error of a notebook.
docs: setup-dev
	$(BIN)/python -m sphinx --quiet --jobs 2 --fail-on-warning --keep-going docs docs/_build/html

benchmarks: setup-dev
	$(BIN)/python benchmarks/paper_tables.py

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) dist build docs/_build dsnet-demo
