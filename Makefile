# Two commands do all the set-up: `make demo` and `make test`. Nothing but Python 3.11+ is needed beforehand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lab lock lint clean

demo: $(STAMP)            ## record a dataset, run the notebooks on it, print the result (DATASET=/path/to/root: the notebooks on your own data)
	$(BIN)/vla $(if $(DATASET),run-all --dataset-root "$(DATASET)",demo) $(ARGS)

test: export VLA_SCREENSHOTS ?= $(CURDIR)/runs/screenshots
test: $(STAMP)            ## all tests, after the same set-up; the browser tests leave their screenshots in runs/screenshots
	$(BIN)/python -m pytest $(ARGS)

lab: $(STAMP)             ## JupyterLab on the notebooks
	$(BIN)/vla lab $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

lock:                     ## pin pyproject.toml's dependencies anew
	$(PYTHON) -m venv $(VENV)-lock && $(VENV)-lock/bin/python -m pip install --quiet uv
	$(VENV)-lock/bin/uv pip compile pyproject.toml --universal --python-version 3.11 --no-annotate --upgrade --quiet --custom-compile-command "make lock" --output-file requirements.lock
	rm -rf $(VENV)-lock

clean:
	rm -rf $(VENV)
