# make demo | test | test-all | lint | clean      (each creates .venv if it does not exist)
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check install -q
SOURCES := setup.py pyproject.toml ltat_fast/__init__.py $(wildcard csrc/* csrc/*/*)

.PHONY: demo test test-all lint clean

demo: $(VENV)/.built
	$(PY) -m ltat_fast.demo

test: $(VENV)/.built $(VENV)/.dev
	$(PY) -m pytest -n 2 --dist loadfile -m "not slow"

test-all: $(VENV)/.built $(VENV)/.dev
	$(PY) -m pytest -n 2 --dist loadfile

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(VENV)/bin/pyright --pythonpath $(PY)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "ltat-fast needs Python 3.10 or newer"'
	$(PYTHON) -m venv $(VENV)

# Install the pinned packages first, then build this package against that torch. --no-deps adds nothing to the pins.
$(VENV)/.requirements: requirements.txt | $(VENV)/bin/python
	$(PIP) -r requirements.txt
	@touch $@

$(VENV)/.built: $(VENV)/.requirements $(SOURCES)
	$(PIP) --no-build-isolation --no-deps -e .
	$(PY) -m ltat_fast.doctor --brief
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.requirements
	$(PIP) -r requirements-dev.txt
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info ltat_fast/*.so
