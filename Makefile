# SPDX-License-Identifier: Apache-2.0
# make demo | lottery | test | check | docs | bench | gpu | dist.  Each is the one command needed on a fresh machine: an environment is
# made in .venv when none is active, and torch is installed only where there is none.
BASE_PYTHON ?= python3
ifneq ($(strip $(VIRTUAL_ENV)),)
  ENV := $(VIRTUAL_ENV)
else ifneq ($(strip $(CONDA_PREFIX)),)
  ENV := $(CONDA_PREFIX)
else
  ENV := $(CURDIR)/.venv
endif
PYTHON := $(ENV)/bin/python
RESULTS ?= benches/results
PYTEST_ARGS ?=
# a process a core, eight at most (each takes a gigabyte); blocks of neighbouring tests, as these share what they train
PARALLEL := -p no:benchmark -n auto --maxprocesses 8 --dist worksteal
# and of one thread each, or they would wait for each other; tests of several threads set their number
ONE_THREAD := OMP_NUM_THREADS=1 ZIPFAST_TEST_THREADS=1

.PHONY: help demo lottery test slow check docs bench gpu gpu-dry dist native clean
help:
	@echo "make demo   train two small networks, merge them, show the result (about a minute)"
	@echo "make lottery  find lottery tickets on handwritten digits, draw the LeNet figures into lottery-out (minutes)"
	@echo "make test   the test suite on every backend this machine has (no GPU or CUDA toolkit needed)"
	@echo "make slow   the tests that take minutes"
	@echo "make check  CUDA compiled and audited, sanitizers, race check, linters (needs nvcc)"
	@echo "make dist   source archive and wheel, each tested in a clean environment; TORCH='2.13.0 2.10.0' for more versions"
	@echo "make docs   the documentation as a site, build/site/index.html"
	@echo "make bench  speed against the peers, into benches/results and docs/benchmarks.md"
	@echo "make gpu    everything that needs an NVIDIA GPU; no network needed; ONLY='tests bench:moments' for parts"
	@echo "make gpu-dry  the same steps without a GPU, small, on the emulator and the CPU: measures nothing"

# --system-site-packages: a torch that is there already serves, whatever its build
$(ENV)/bin/python:
	$(BASE_PYTHON) -m venv --system-site-packages $(ENV)

# only packages, but for the demo: `native` compiles, once
$(ENV)/.zipfast-%: pyproject.toml setup.py CMakeLists.txt | $(ENV)/bin/python
	$(PYTHON) -c "import torch" 2>/dev/null || $(PYTHON) -m pip install -q torch==2.13.0
	$(if $(filter demo,$*),,ZIPFAST_NATIVE=0) $(PYTHON) -m pip install -q -e '.[$*]'
	@touch $@

demo: $(ENV)/.zipfast-demo
	$(PYTHON) -m zipfast demo

lottery: $(ENV)/.zipfast-demo
	PYTHONPATH=. $(PYTHON) benches/lottery_figure.py

# an edit of csrc is compiled again before the tests see it
native: $(ENV)/.zipfast-test
	@mkdir -p build
	@ZIPFAST_EMU=1 $(PYTHON) setup.py -q build_ext --inplace > build/native.log 2>&1 || { cat build/native.log; exit 1; }

test: native
	$(ONE_THREAD) $(PYTHON) -m pytest -q -p no:cacheprovider $(PARALLEL) tests zipfast --doctest-modules $(PYTEST_ARGS)

slow: native
	$(PYTHON) -m pytest -q -m slow tests $(PYTEST_ARGS)

check: native $(ENV)/.zipfast-check
	$(PYTHON) tests/check/check.py

TORCH ?=
dist: $(ENV)/.zipfast-dist
	$(PYTHON) tests/check/dist.py $(TORCH:%=--torch %)

# read from the sources: no torch, no compiler
docs: | $(ENV)/bin/python
	@$(PYTHON) -c "import mkdocs, material, mkdocstrings_handlers.python, latex2mathml" 2>/dev/null || \
	  $(PYTHON) -m pip install -q $$($(PYTHON) tests/check/site_check.py)
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict
	@echo build/site/index.html

bench: native
	PYTHONPATH=. RESULTS=$(RESULTS) $(PYTHON) -m pytest -q benches
	PYTHONPATH=. RESULTS=$(RESULTS) $(PYTHON) benches/report.py

# No environment and no network: the machine's own torch, nvcc, cmake, ninja and pybind11.
DRY ?=
ONLY ?=
GPU_ARGS := $(if $(ONLY),--only $(ONLY))
ifneq ($(strip $(DRY)),)
gpu: gpu-dry
else
gpu:
	PYTHONPATH=. RESULTS=$(RESULTS) $(BASE_PYTHON) benches/gpu.py $(GPU_ARGS)
endif

gpu-dry: native
	PYTHONPATH=. $(PYTHON) benches/gpu.py --dry-run $(GPU_ARGS)

clean:
	rm -rf build dist *.egg-info zipfast/*.so .pytest_cache
