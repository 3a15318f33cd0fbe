# `make demo` and `make test` do all the set-up. Nothing but Python 3.11 or newer is needed beforehand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
USER := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
PIN = $(VENV)-lock/bin/uv pip compile --universal --python-version 3.11 --no-annotate --quiet \
	--custom-compile-command "make lock" $(ARGS)

.PHONY: demo test lab lint lock clean

# DATASET=/path/to/root: the notebooks on your own data, in place of a recording on the simulated rig
demo: $(USER)             ## record a dataset, run the notebooks on it, print the result
	$(BIN)/vla $(if $(DATASET),run-all --dataset-root "$(DATASET)",demo) $(ARGS)

lab: $(USER)              ## JupyterLab on the notebooks
	$(BIN)/vla lab $(ARGS)

test: export VLA_SCREENSHOTS ?= $(CURDIR)/runs/screenshots
test: $(DEV)              ## all tests; the browser tests leave their screenshots in runs/screenshots
	$(BIN)/python -m pytest $(ARGS)

lint: $(DEV)              ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(USER): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, \
	this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --requirement requirements.lock
	$(PIP) --no-deps --editable .
	touch $@

$(DEV): $(USER) requirements-dev.lock
	$(PIP) --requirement requirements-dev.lock
	touch $@

# The second lock is bound to the first: a package that is in both has one version.
lock:                     ## pin pyproject.toml's dependencies (ARGS=--upgrade: at their newest versions)
	$(PYTHON) -m venv $(VENV)-lock && $(VENV)-lock/bin/python -m pip install --quiet uv
	$(PIN) pyproject.toml --output-file requirements.lock
	$(PIN) --group dev --constraint requirements.lock --output-file requirements-dev.lock
	rm -rf $(VENV)-lock

clean:
	rm -rf $(VENV)
