# make demo   a recall table and a report of a small city drawn by code, from a fresh clone
# make test   all tests                make check  lint, types, import contracts, the site
# make test-fast  most unit tests and one run on Ray, in under two minutes
# make docs   the site in site/, with a reference of all modules
# make soak   faults and properties at length, by hand
# make tiny   train the small network of the demo from nothing, in half an hour
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast check docs soak tiny lock clean

PYTHON ?= python3
BIN := .venv/bin
DEMO ?= demo
TINY ?= tiny
FAST := tests/ray/test_equals_single_machine.py::test_index_then_query tests/unit tests/numerics

help:
	@grep '^# ' Makefile | cut -c3-

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[cpu,dev,serve]"
	@touch $@

setup: .venv/installed

demo: setup
	$(BIN)/python -m ray_jobs.evaluate benchmark=toy_city rerank.num_candidates=20 output=$(DEMO)
	$(BIN)/python -m ray_jobs.report run=$(DEMO)

test: setup
	$(BIN)/python -m pytest tests -m "not soak and not cluster" -n 2 --dist loadfile --durations 20
	$(BIN)/python -m pytest tests -m "cluster and not soak" -vv --durations 20

test-fast: setup
	$(BIN)/python -m pytest $(FAST) -m "not soak and not slow" -n 2 --dist loadfile --no-loadscope-reorder

check: setup docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# Offline; dead links and warnings are errors.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

soak: setup
	$(BIN)/python -m pytest tests -m soak

# On two cores, from nothing to tiny/tiny.safetensors; the same command again goes on where it was killed.
tiny: setup
	$(BIN)/python -m pairvpr.toy.training_sets $(TINY)/photos
	$(BIN)/python -m ray_jobs.train_stage_one train=tiny train.root=$(TINY)/photos output=$(TINY)/stage_one
	$(BIN)/python -m ray_jobs.train_stage_two train=tiny train.root=$(TINY)/photos output=$(TINY)/stage_two \
	    train.start=$(TINY)/stage_one/checkpoints/last.pt train.validation=toy_city train.validation.seed=500 \
	    train.validation.num_places=200
	$(BIN)/python -m ray_jobs.export_weights checkpoint=$(TINY)/stage_two/checkpoints/last.pt \
	    output=$(TINY)/tiny.safetensors half=true

# The exact packages of a cluster's nodes and of the containers (Python 3.11, Linux; CUDA 12 or none), and of the tools
# that build containers. PyTorch's builds without CUDA have a package index of their own, which uv knows; where it can't
# be reached, CPU_WHEELS="--find-links DIR" takes the wheel from a folder.
CPU_WHEELS ?= --torch-backend cpu
COMPILE := $(BIN)/uv pip compile --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
    --generate-hashes --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock"
lock: setup
	$(COMPILE) pyproject.toml requirements/cluster.in --extra gpu --extra serve --output-file requirements/cluster.lock
	$(COMPILE) pyproject.toml requirements/cpu.in --extra cpu --extra serve $(CPU_WHEELS) --output-file requirements/cpu.lock
	$(COMPILE) requirements/build.in --output-file requirements/build.lock

clean:
	rm -rf .venv $(DEMO) $(TINY) site
