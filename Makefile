# make demo   a recall table of a small city drawn by code, from a fresh clone
# make test   all tests                make check  lint, types, import contracts
# make soak   faults and properties at length, by hand
.DEFAULT_GOAL := help
.PHONY: help setup demo test check soak lock clean

PYTHON ?= python3
BIN := .venv/bin
DEMO ?= demo

help:
	@grep '^# ' Makefile | cut -c3-

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[cpu,dev]"
	@touch $@

setup: .venv/installed

demo: setup
	$(BIN)/python -m ray_jobs.evaluate benchmark=toy_city output=$(DEMO)

test: setup
	$(BIN)/python -m pytest tests -m "not soak and not cluster" -n 2 --dist loadfile
	$(BIN)/python -m pytest tests -m "cluster and not soak"

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

soak: setup
	$(BIN)/python -m pytest tests -m soak

# The exact packages of a cluster's nodes (Python 3.11, Linux, CUDA 12).
lock: setup
	$(BIN)/uv pip compile --quiet pyproject.toml requirements/cluster.in --extra gpu --python-version 3.11 \
	    --python-platform x86_64-manylinux_2_28 --generate-hashes --no-emit-index-url --no-emit-find-links \
	    --custom-compile-command "make lock" --output-file requirements/cluster.lock

clean:
	rm -rf .venv $(DEMO)
