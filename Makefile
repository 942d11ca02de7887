# Everything a newcomer needs: make demo, make demo-dp, make test; before a change is handed in, make check test test-slow.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo demo-dp notebook test test-slow test-notebooks test-quantised test-deploy check format config tables clean

setup: $(STAMP)

# The activate script gets the one variable that only an environment can carry: without it every `flwr run`
# installs [project].dependencies anew, torch among them (see README).
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	grep -q FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION $(BIN)/activate || \
		echo 'export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1' >> $(BIN)/activate
	touch $(STAMP)

demo: setup
	$(BIN)/fedlora run

demo-dp: setup
	$(BIN)/fedlora run -c simulations/recipes/dp.toml

# Opens the notebooks in JupyterLab, which is not a part of setup.
notebook: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[notebook]'
	$(BIN)/jupyter lab notebooks

# Unit tests side by side, each process on one core; what starts Flower and Ray after them, one at a time.
UNIT := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal
E2E := $(BIN)/python -m pytest

test: setup
	$(UNIT) -m "not e2e and not slow"
	$(E2E) -m "e2e and not slow and not deploy"

# Killed runs, recordings and soaks, two files side by side, since they wait as long as they compute; some run nowhere else.
test-slow: setup
	$(UNIT) -m "not e2e and slow"
	$(E2E) --numprocesses 2 --dist loadfile -m "e2e and slow"
	$(MAKE) test-quantised
	$(MAKE) test-notebooks

# Both notebooks from an empty folder to the end, with FAST = True, each paired with its .py.
test-notebooks: setup
	RUNS=$$(mktemp -d) FAST=True $(BIN)/python -m pytest --nbmake --numprocesses 2 notebooks/*.ipynb

# A quantised base. bitsandbytes lies apart: where it is installed, every process that imports PEFT imports it, for seconds.
QUANTISATION := $(VENV)/quantisation
test-quantised: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(QUANTISATION) \
		--constraint constraints.txt bitsandbytes
	PYTHONPATH=$(QUANTISATION) $(UNIT) tests/test_quantised.py tests/test_quantised_runs.py tests/test_cuda_quantised.py

# A deployed federation under faults and attacks: kills, cut networks, malicious sites and servers (docs/reliability.md).
test-deploy: setup
	$(E2E) -m "e2e and deploy" -s

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

config: setup
	$(BIN)/python -m simulations.app_config .

tables: setup
	$(BIN)/python -m tools.strategy_tables .
	$(BIN)/python -m tools.method_tables .
	$(BIN)/python -m tools.comparison_tables .
	$(BIN)/python -m tools.learning_rates .
	$(BIN)/python -m tools.performance_tables .
	$(BIN)/python -m tools.model_table .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
