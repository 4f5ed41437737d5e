# make demo    a picture of two people from two photographs, through the whole system
# make test    everything, on a CPU
# Each makes its own virtual environment in .venv and installs what it needs.

PYTHON      ?= python3
TORCH_INDEX ?=
VENV        := .venv
RUN         := $(VENV)/bin/python

.PHONY: demo test lint clean

demo: $(VENV)/.demo
	$(RUN) -m export.build --out engines/miniature
	$(RUN) -m examples.demo --engine engines/miniature --out out

test: $(VENV)/.test lint
	$(RUN) -m pytest

lint: $(VENV)/.test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first, from where its CPU build is: PyPI's own Linux wheel brings gigabytes of CUDA.
$(VENV)/.demo: $(VENV)/bin/python setup.py
	$(RUN) -m pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(RUN) -m pip install -q -e '.[cpu,export]'
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(RUN) -m pip install -q -e '.[cpu,export,dev]'
	touch $@

clean:
	rm -rf $(VENV) build out *.egg-info engines/miniature engines/test-* engines/.[!.]*
