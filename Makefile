# Two commands matter: `make sweep` and `make test`. Each sets up what it needs
# in .venv. To use an environment that exists already (no network, say):
#   make test PYTHON=python3

PYTHON ?= .venv/bin/python
SETUP = $(if $(filter .venv/bin/python,$(PYTHON)),.venv/ready)
ORACLE = .oracle/bin/python
TPU = .tpu/bin/python
GPU = .gpu-0.11/bin/python .gpu-0.12/bin/python
FLAGS ?=

.PHONY: help setup sweep test test-tpu lint format parity golden notebooks \
  notebooks-check tpu-compile tpu-cost gpu-compile test-gpu clean

help:
	@echo "make sweep    from a checkpoint to a reuse schedule (FLAGS='--checkpoint=...')"
	@echo "make test     lint rules and tests, on the CPU"
	@echo "make parity   compare with transformers on 30 fresh random models"
	@echo "make lint     ruff's rules and format;  make format  applies them"
	@echo "make golden   make the golden fixtures again"
	@echo "make notebooks  run the notebooks and keep their outputs"
	@echo "make test-tpu     interpret the TPU kernels on the CPU"
	@echo "make tpu-compile  compile the TPU kernels with no TPU;  make tpu-cost  costs them"
	@echo "make gpu-compile  compile the GPU kernels for sm_90a with no GPU"
	@echo "make test-gpu     test them on the GPU that is here"
	@echo "make clean    remove what make made"

setup: $(SETUP)

sweep: $(SETUP)
	$(PYTHON) -m experiments.sweep_schedules $(FLAGS)

test: $(SETUP) lint
	JAX_PLATFORMS=cpu $(PYTHON) -m pytest --ignore-glob='$(TPU_TESTS)' $(FLAGS)

# The TPU kernels in an interpreter that simulates memories, copies and races:
# as long as a third of the other tests, so a command of its own.
TPU_TESTS = tests/kernels/*_mosaic_tpu_test.py
test-tpu: $(SETUP)
	JAX_PLATFORMS=cpu $(PYTHON) -m pytest $(TPU_TESTS) $(FLAGS)

lint: $(SETUP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format: $(SETUP)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

parity: $(SETUP) $(ORACLE)
	JAX_PLATFORMS=cpu $(PYTHON) -m tests.oracle.parity --oracle_python=$(ORACLE) $(FLAGS)

golden: $(ORACLE)
	$(ORACLE) -m tests.oracle.make_golden

notebooks: $(SETUP)
	$(PYTHON) tools/run_notebooks.py

notebooks-check: $(SETUP)
	JAX_PLATFORMS=cpu $(PYTHON) tools/run_notebooks.py --check

tpu-compile: $(TPU)
	$(TPU) -m tests.tpu.compile_kernels $(FLAGS)

tpu-cost: $(TPU)
	$(TPU) -m tests.tpu.cost_kernels --output_dir=results/tpu $(FLAGS)

# Both versions of JAX: their Mosaic GPU differ.
gpu-compile: $(GPU)
	for python in $(GPU); do $$python -m tests.gpu.compile_kernels $(FLAGS) || exit; done

test-gpu: $(SETUP)
	$(PYTHON) -m tests.gpu.run_tests $(FLAGS)

.venv/ready: setup.cfg pyproject.toml constraints.txt tools/make_venv
	tools/make_venv .venv 3.12 --editable '.[notebook,test]' --constraint constraints.txt
	@touch $@

# torch's CPU build is for Python 3.11 alone, which jax no longer supports, so
# the oracle has an environment of its own.
$(ORACLE): tests/oracle/requirements.txt tools/make_venv
	tools/make_venv .oracle =3.11 --requirement tests/oracle/requirements.txt
	@touch $@

# jax and libtpu must match; the project's own jax may be another.
$(TPU): tests/tpu/requirements.txt tools/make_venv
	tools/make_venv .tpu 3.12 --requirement tests/tpu/requirements.txt
	@touch $@

.gpu-%/bin/python: tests/gpu/requirements-%.txt tools/make_venv
	tools/make_venv .gpu-$* 3.12 --requirement tests/gpu/requirements-$*.txt
	@touch $@

clean:
	rm -rf .venv .oracle .tpu .gpu-* .cache build dist *.egg-info runs sweep_output
