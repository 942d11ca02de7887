# Everything a newcomer needs: make demo, make demo-dp, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo demo-dp test check format config tables clean

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

test: setup
	$(BIN)/python -m pytest

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
	$(BIN)/python -m simulations.tables .
	$(BIN)/python -m benchmarks.comparison .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
