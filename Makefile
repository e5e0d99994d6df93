# Everything a person or CI calls. `make` alone lists the targets.
VENV   ?= .venv
PYTHON ?= python3
MOKD   := $(VENV)/bin/mokd
STAMP  := $(VENV)/.installed
CONFIG ?= demo.yaml
NODES  ?= 1
NPROC  ?= 2
ARGS   ?=

.PHONY: help setup demo demo-data test lint format wheel docs bench gpu-check launch train eval convert slurm-up slurm-down faults clean

help:
	@echo 'make demo                                   install, then train a small pair end to end (DATA=folder for your images)'
	@echo 'make test                                   lint, then all tests'
	@echo 'make format                                 ruff: format, and fix what it can'
	@echo 'make wheel                                  dist/mokd-*.whl, which installs without a compiler'
	@echo 'make docs                                   the pages as a site, in build/site'
	@echo 'make convert SRC=imagenet/train OUT=train.beton'
	@echo 'make train   CONFIG=demo.yaml NPROC=2       train on this machine'
	@echo 'make launch  CONFIG=vit_s_resnet50.yaml NODES=4'
	@echo 'make eval    RUN=runs/demo                  k-NN of every branch'
	@echo 'make gpu-check                              on a machine with a GPU: does it compute the same, wait, how fast (PART=...)'
	@echo 'make slurm-up slurm-down                    a real SLURM cluster on this machine, for development'
	@echo 'ARGS="..." is passed on to the command.'

setup: $(STAMP)

# quick when nothing has changed: the stamp is newer than what it depends on
$(STAMP): pyproject.toml constraints.txt setup.py tools/setup $(wildcard data_pipeline/native/* mokd/native/*)
	@tools/setup '$(VENV)' '$(PYTHON)'
	@touch $@

demo: setup
	@$(MOKD) demo $(if $(DATA),--data '$(DATA)') --nproc '$(NPROC)' $(ARGS)

demo-data: setup
	@$(MOKD) demo --data-only

test: lint
	$(VENV)/bin/python -m pytest -m 'not slow' $(ARGS)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

wheel: setup
	@tools/wheel '$(VENV)'

docs: setup
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@# without a notice about other tools
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build -q --site-dir build/site
	@echo build/site/index.html

bench: setup
	$(MOKD) bench data $(ARGS)

gpu-check: setup
	$(VENV)/bin/python -m benchmarks.gpu_check $(if $(PART),--part $(PART)) $(ARGS)

convert: setup
	$(if $(SRC),,$(error make convert: give SRC=folder OUT=file.beton))
	$(MOKD) convert '$(SRC)' $(if $(OUT),'$(OUT)') $(ARGS)

train: setup
	$(MOKD) train '$(CONFIG)' --nproc '$(NPROC)' $(ARGS)

launch: setup $(if $(filter demo demo.yaml,$(notdir $(CONFIG))),demo-data)
	$(MOKD) launch '$(CONFIG)' --nodes '$(NODES)' $(ARGS)

eval: setup
	$(MOKD) eval '$(RUN)' $(ARGS)

slurm-up: setup
	@slurm/up $(ARGS)

slurm-down:
	@slurm/down $(ARGS)

faults: setup
	$(VENV)/bin/python -m tests.faults $(ARGS)

clean:
	rm -rf '$(VENV)' build *.egg-info .mypy_cache .ruff_cache .pytest_cache
