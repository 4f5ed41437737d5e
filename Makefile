# make demo    pictures of two and of three people, through the whole system, on one sheet: out/demo.png
# make test    the fast tests, and a sixth of the slow ones: those of lane LANE (0 to 5), by default the commit's
# make test-all  every test that needs no GPU
# make gpu-test  the tests and benchmarks that need an NVIDIA GPU, into gpu-test.json
# Each makes its own virtual environment and installs what it needs.

PYTHON      ?= python3
TORCH_INDEX ?=
VENV        := .venv
RUN         := $(VENV)/bin/python
GPU_VENV    := .venv-gpu
LANE        ?= commit

.PHONY: demo test test-all pytest lint ruff mypy gpu-test clean

demo: $(VENV)/.demo
	$(RUN) -m export.build --out engines/miniature
	$(RUN) -m examples.demo --engine engines/miniature --out out
	$(RUN) -m examples.photographs --engine engines/miniature --out out

test: ruff
	$(MAKE) --jobs 2 mypy pytest

test-all: ruff
	$(MAKE) --jobs 2 mypy pytest LANE=all

pytest: $(VENV)/.test
	$(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --lane $(LANE)

lint: ruff mypy

ruff: $(VENV)/.test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

mypy: $(VENV)/.test
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

# An environment of its own: onnxruntime and onnxruntime-gpu overwrite each other.
gpu-test: $(GPU_VENV)/.installed
	$(GPU_VENV)/bin/python -m benchmarks.gpu --out gpu-test.json

$(GPU_VENV)/.installed: setup.py
	$(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install -q torch==2.13.0
	$(GPU_VENV)/bin/python -m pip install -q -e '.[gpu,tensorrt,export,dev]'
	touch $@

clean:
	rm -rf $(VENV) $(GPU_VENV) build out *.egg-info engines/miniature engines/test-* engines/.[!.]*
