# make demo       fine-tune the embedded model with every method and print one table
# make test       the tests; TESTS=tests/data names some
# make test-peers the tests against torch and PEFT, which it installs
# make test-slice 12 minutes of the slow tests, of each commit others; MINUTES=
# make test-colab the tests of what notebooks use, with the oldest versions: those that Colab has (Python 3.13)
# make test-all   all of them: peers, slow ones, notebooks, the TPU compiler
# make bench      the tables of benchmarks/, into runs/benchmarks; ARGS="decoding --quick" names one in small sizes
# make lint       ruff, mypy and shellcheck
# make docs       the site of docs/, into build/site
# make release    wheel and sdist, into dist: the same bytes twice, and the wheel works outside the repository; ARGS=--lowest tries the floors
#
# Each makes and fills the environment VENV (.venv) where it is missing or stale. PYTHON= names the interpreter; without
# it the first of the candidates below that runs, is 3.11 or newer and can make environments is taken.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-peers test-slice test-colab colab-tests test-all bench lint docs release clean FORCE

CANDIDATES := python3.13 python3.12 python3.11 python3 python
USABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
# A launcher on the PATH may name an interpreter that is not installed, so each candidate is run. The base
# executable is what counts: `python3` of an activated environment stands for the one that it was made from.
ifndef PYTHON
PYTHON := $(shell for p in $(CANDIDATES); do "$$p" -c '$(USABLE)' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
endif
BASE := $(shell "$(PYTHON)" -c '$(USABLE)' >/dev/null 2>&1 && "$(PYTHON)" -c 'import sys; print(sys._base_executable)')

VENV := .venv
BIN := $(VENV)/bin
# What the environment depends on besides pyproject.toml: the interpreter, and the folder (scripts hold its path).
IDENTITY := $(BASE) $(shell "$(BASE)" -c 'import sys; print(*sys.version.split())' 2>/dev/null) $(CURDIR)

# Most of a test's time goes into compiling on one core. A worker takes up to 2 GB. One that dies ends the run, which
# names its test, and one whose test hangs (native code too) is ended after a time that a loaded machine doesn't need.
TIMEOUT := 900
PYTEST = $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --max-worker-restart 0 \
  --timeout $(TIMEOUT) --timeout-method thread

export PIP_DISABLE_PIP_VERSION_CHECK := 1

help:
	@sed -n 's/^# \(make .*\)/  \1/p' Makefile

demo: $(VENV)/.installed-plots
	$(BIN)/mora-jax demo --out runs/demo $(ARGS)

test: $(VENV)/.installed-test
	$(PYTEST) -m "not slow and not peers" $(TESTS) $(ARGS)

test-peers: $(VENV)/.installed-peers
	$(PYTEST) -m "not slow and peers" $(ARGS)

MINUTES := 12
test-slice: $(VENV)/.installed-all
	$(PYTEST) -m slow --slice "$$(git rev-parse HEAD)" --minutes $(MINUTES) --no-loadscope-reorder -rNfE $(ARGS)

# Colab's versions of August 2026, where replacing jax breaks the accelerator's plugin: nothing of these may change.
COLAB := jax==0.7.2 jaxlib==0.7.2 flax==0.12.0 optax==0.2.8 orbax-checkpoint==0.12.4 transformers==5.15.0 \
  absl-py==1.4.0 pyarrow==18.1.0 datasets==4.0.0 grain==0.2.18 numpy==2.1.3
COLAB_TESTS := tests/adapters/test_attach.py tests/adapters/methods tests/adapters/test_convolutions.py tests/linen \
  tests/functional tests/interop/peft tests/training/test_finetune.py tests/training/test_step.py \
  tests/training/test_loop.py tests/test_environment.py
# Four tests are about newer jax: its switch for 64 bits, how it writes shardings, optimizer.offload on CPUs, and there
# products of bfloat16 into float32.
NEWER := --deselect tests/linen/test_interception.py::test_float64_layers_stay_float64 \
  --deselect tests/linen/test_interception.py::test_on_the_mesh_that_make_mesh_gives \
  --deselect tests/training/test_loop.py::test_a_run_goes_on_where_paths_and_devices_are_others \
  --deselect tests/training/test_step.py::test_bfloat16_base_keeps_float32_masters
test-colab:
	$(MAKE) VENV=.venv-colab colab-tests
colab-tests: $(VENV)/.interpreter
	$(BIN)/python -m pip install --quiet -e '.[plots]' $(COLAB)
	$(BIN)/python -m pip install --quiet 'pytest>=8.3' 'pytest-timeout>=2.3' 'pytest-xdist>=3.6' 'hypothesis>=6.112'
	$(PYTEST) -m "not slow and not peers" $(NEWER) $(or $(TESTS),$(COLAB_TESTS)) $(ARGS)

test-all: TIMEOUT := 7200
test-all: $(VENV)/.installed-all
	$(PYTEST) $(ARGS)

bench: $(VENV)/.installed-peers
	$(BIN)/python benchmarks/run.py $(ARGS)

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --strict --follow-imports=silent tests/consumer.py
	$(BIN)/shellcheck scripts/launch/*.sh scripts/launch/*.sbatch .ci/run

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)
	@echo "the site is in $(CURDIR)/build/site: open $(CURDIR)/build/site/index.html"

release: $(VENV)/.interpreter
	$(BIN)/python -m pip install --quiet 'hatchling>=1.26'
	$(BIN)/python scripts/check_release.py --python $(BASE) $(ARGS)

clean:
	rm -rf $(VENV) build dist

# The rule that fills the environment: one stamp for each extra, stale when the environment or pyproject.toml changes.
$(VENV)/.installed-%: $(VENV)/.interpreter pyproject.toml
	@echo "Installing mora-jax[$*] into $(VENV); the first time takes minutes" >&2
	@$(BIN)/python -m pip install --quiet -e '.[$*]'
	@touch $@

# Rewritten, and so newer than the stamps, only when the environment had to be made again.
$(VENV)/.interpreter: FORCE
	@if [ -z "$(BASE)" ]; then \
	  echo "error: no usable Python ($(or $(PYTHON),$(CANDIDATES))): 3.11 or newer with venv and ensurepip is needed;" \
	    "name one with make PYTHON=/path/to/python3" >&2; exit 2; fi; \
	if [ "$$(cat $@ 2>/dev/null)" != '$(IDENTITY)' ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  echo "Making $(VENV) with $(BASE)" >&2; \
	  rm -rf $(VENV) && "$(BASE)" -m venv $(VENV) && $(BIN)/python -m pip install --quiet --upgrade pip && \
	  echo '$(IDENTITY)' > $@; fi

FORCE:
