# Four verbs for people: demo, test, check, bench. Each sets up .venv first when it is not there yet.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
# PyTorch's own CPU wheels instead of the default build: make demo TORCH_INDEX=<the index URL from pytorch.org>
TORCH_INDEX ?=
TORCH := torch==2.13.0
# The CUDA build of fbgemm does not load without an NVIDIA driver, and both builds claim the same module.
FBGEMM := $(if $(wildcard /proc/driver/nvidia/version),fbgemm-gpu,fbgemm-gpu-cpu)==1.8.0
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet

export PYTHONSAFEPATH := 1
export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true

CHECKPOINTS ?= runs/checkpoints/*

.PHONY: help setup demo test test-long check lint types imports bench bench-home bench-kernels bench-serve bench-llm scaling results kernels-aot gpu-check clean

help:  ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.ready  ## create .venv with everything pinned

$(VENV)/.ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: set PYTHON=" >&2; exit 1; }
	@echo "Setting up $(VENV) (a few minutes, once)" >&2
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --constraint requirements.txt setuptools wheel
	$(PIP_INSTALL) --constraint requirements.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
# The kernels need torch alone: they are built while the rest is fetched.
	$(BIN)/python -m recsys_moe.kernels.cpu & built=$$!; \
	$(PIP_INSTALL) --no-deps --no-build-isolation --requirement requirements.txt $(FBGEMM) && wait $$built
	@touch $@

demo: $(VENV)/.ready  ## log rows to a served score, end to end, in minutes
	$(BIN)/recsys-moe demo

test: $(VENV)/.ready  ## the test suite
	$(BIN)/pytest -m "not long" --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-long: $(VENV)/.ready  ## soaks, overload, chaos, big data
	$(BIN)/pytest -m long

check: lint types imports  ## ruff, mypy, import directions

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Type checkers do not follow package-dir: give them the installed shape as a tree of links.
types: $(VENV)/.ready
	@rm -rf build/types && mkdir -p build/types/recsys_moe
	@ln -s $(CURDIR)/recsys_moe/* build/types/recsys_moe/
	@for folder in kernels pipelines serving conf; do ln -s $(CURDIR)/$$folder build/types/recsys_moe/$$folder; done
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p recsys_moe

imports: $(VENV)/.ready
	$(BIN)/pytest -q tests/test_imports.py

bench: $(VENV)/.ready  ## training rate beside the peers', and start-up beside a trivial fit, in the same minutes
	$(BIN)/python benchmarks/bench_training.py
	$(BIN)/python benchmarks/bench_startup.py

bench-home: $(VENV)/.ready  ## HoME trained on the synthetic feed, beside the peers' modules
	$(BIN)/python benchmarks/bench_home.py

bench-kernels: $(VENV)/.ready  ## the expert kernels beside their peers, in the same minutes
	$(BIN)/recsys-moe bench kernels --figure docs/scaling.png

bench-llm: $(VENV)/.ready  ## the LLM engine beside transformers, on the Hugging Face folders that CHECKPOINTS names
	$(BIN)/python benchmarks/bench_llm.py $(CHECKPOINTS)

bench-serve: $(VENV)/.ready  ## the service on one core, its client on another, beside the peers' modules
	$(BIN)/python benchmarks/bench_serve.py runs/bench_serve

scaling: $(VENV)/.ready  ## what a sample costs along five axes: docs/scaling.md and its plots
	$(BIN)/python benchmarks/bench_scaling.py

results: $(VENV)/.ready  ## the model comparisons of docs/results.md: hours, goes on where it was stopped
	$(BIN)/python benchmarks/results.py

kernels-aot: $(VENV)/.ready  ## compile every Triton kernel for every target, no GPU needed: registers, spills, shared memory
	$(BIN)/python -m recsys_moe.kernels.aot

gpu-check: $(VENV)/.ready  ## on a GPU: correctness, shares of the peaks, training on cuda
	$(BIN)/python benchmarks/gpu_check.py

clean:  ## remove what was built, not what was trained
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
