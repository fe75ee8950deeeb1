# From a fresh clone: `make quickstart` trains, stacks, compares and plots; `make test` runs every test this machine can run.
# They install what they need into .venv. An environment of your own: make test VENV= PYTHON=python3
# Where there is a GPU, minutes each, into bench/results/GPU-DATE/: `make gpu-right`, `make gpu-fast`, `make gpu-tune`. They install
# nothing: they run in .venv, if it is there, or in PYTHON, and take what that lacks as wheels from WHEELS (bench/gpu.py).

PYTHON ?= python3
VENV ?= .venv
ifeq ($(VENV),)
RUN := $(PYTHON)
READY :=
else
RUN := $(VENV)/bin/python
READY := $(VENV)/ready
endif

comma := ,
GPU := $(if $(filter command,$(firstword $(origin PYTHON))),$(PYTHON),$(or $(wildcard $(VENV)/bin/python),$(PYTHON)))
WHEELS ?=
CACHE ?=
FOR ?= 3.12

.PHONY: quickstart test docs gpu-right gpu-fast gpu-tune gpu-wheels gpu-cache dry-gpu lint format clean

quickstart: $(READY)
	$(RUN) -m study.quickstart $(ARGS)

test: $(READY)
	$(RUN) -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)  # what a file shares is made once

gpu-right gpu-fast gpu-tune:
	$(GPU) -m bench.gpu $(@:gpu-%=%) $(if $(WHEELS),--wheels $(WHEELS)) $(if $(CACHE),--cache $(CACHE)) $(ARGS)

gpu-wheels:
	$(GPU) -m bench.gpu wheels $(if $(WHEELS),--wheels $(WHEELS)) --for $(FOR)

# What gpu tests launch, compiled for these architectures with no GPU; with another Triton, unpacked beside: make dry-gpu TRITON=3.6.0
ARCH ?= sm_90,sm_80
dry-gpu: $(READY)
ifdef TRITON
	test -d out/triton-$(TRITON)/triton || $(RUN) -m pip install --quiet --no-deps --target out/triton-$(TRITON) triton==$(TRITON)
endif
	PYTHONPATH=$(if $(TRITON),out/triton-$(TRITON)) $(RUN) -m pytest -q -n 2 --dry-gpu=$(ARCH) $(ARGS)

# The same for one Triton, kept in CACHE under the keys of another Python's wheel of it (bench/carried.py), to travel to a GPU
ifeq ($(filter gpu-cache,$(MAKECMDGOALS))$(CACHE),gpu-cache)
$(error name the folder to fill, as in make gpu-cache CACHE=out/compiled)
endif
gpu-cache: TRITON ?= 3.6.0
gpu-cache: $(READY)
	test -d out/triton-$(TRITON)/triton || $(RUN) -m pip install --quiet --no-deps --target out/triton-$(TRITON) triton==$(TRITON)
	test -d out/triton-$(TRITON)-$(FOR)/triton || $(RUN) -m pip install --quiet --no-deps --only-binary=:all: --python-version $(FOR) \
		--platform manylinux_2_27_x86_64 --target out/triton-$(TRITON)-$(FOR) triton==$(TRITON)
	TRITON_CACHE_DIR=$(CACHE) PYTHONPATH=out/triton-$(TRITON):. $(RUN) -m pytest -q -n 2 -p bench.carried \
		--compiled-for out/triton-$(TRITON)-$(FOR) --dry-gpu=$(firstword $(subst $(comma), ,$(ARCH))) -m gpu $(ARGS)

docs: $(READY)
	$(RUN) -m mkdocs build --strict

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -c "from importlinter.cli import lint_imports_command; lint_imports_command()"

format: $(READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf $(VENV) data out

$(VENV)/ready: pyproject.toml constraints.txt constraints-clients.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "nanostack needs Python 3.11 or newer, this is " + sys.version'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt "torch==2.13.0"
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
