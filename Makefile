# Every target does its own set-up. The second time that takes no network and next to no time: each step
# leaves a stamp and runs again when what it depends on has changed.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

export PATH := $(HOME)/.cargo/bin:$(PATH)

VENV   := .venv
PYTHON_IN_VENV := $(VENV)/bin/python
STAMPS := $(VENV)/.stamps
CARGO  := .ci/cargo

NATIVE_SOURCES := $(shell find rust -type f) $(wildcard Cargo.toml Cargo.lock) .cargo/config.toml pyproject.toml
NATIVE_MODULE  := $(wildcard python/llamactor/_core*.so)

.PHONY: help
help:
	@awk -F ' +## ' '/^\.PHONY: .* ## / {sub(/^\.PHONY: /, "make "); printf "  %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo  ## set everything up, then chat with SmolLM2-135M-Instruct (no terminal: a short exchange)
demo: build
	@if [[ -t 0 && -t 1 ]]; then exec $(PYTHON_IN_VENV) -m llamactor chat; fi; \
	printf '%s\n' "What is the capital of France, and what is it known for?" "Summarize that in one sentence." /stats | \
		$(PYTHON_IN_VENV) -m llamactor chat --echo --max-tokens 256

.PHONY: test  ## set everything up, then run the whole suite (ARGS="-k name" for a part)
test: build
	$(PYTHON_IN_VENV) -m pytest $(ARGS)

.PHONY: test-rust  ## the tests of the Rust parts: no Python, no model
test-rust: build
	$(CARGO) test --release --lib --tests

.PHONY: bench  ## measure beside raw llama.cpp loops, ratios first (some minutes)
bench: build
	$(CARGO) bench --bench text
	$(PYTHON_IN_VENV) -m pytest benches
	$(PYTHON_IN_VENV) -m benches.ratios $(ARGS)
	$(PYTHON_IN_VENV) -m benches.structured

.PHONY: lint  ## formats, lints, types, and the stub against the built module
lint: build
	$(PYTHON_IN_VENV) -m ruff format --check
	$(PYTHON_IN_VENV) -m ruff check
	$(PYTHON_IN_VENV) -m mypy
	$(PYTHON_IN_VENV) -m mypy.stubtest llamactor._core --mypy-config-file pyproject.toml
	$(CARGO) fmt --check
	$(CARGO) clippy --release --all-targets -- -D warnings

.PHONY: format  ## format Rust and Python, and apply the safe fixes of ruff
format: $(STAMPS)/environment
	$(PYTHON_IN_VENV) -m ruff format
	$(PYTHON_IN_VENV) -m ruff check --fix
	$(CARGO) fmt

.PHONY: build  ## install the release build and the default model into .venv
build: $(STAMPS)/model $(STAMPS)/core

.PHONY: clean  ## remove .venv, the native module and all that was built
clean:
	rm -rf $(VENV) target python/llamactor/_core*.so

$(STAMPS)/environment: .ci/setup pyproject.toml
	@.ci/setup system
	@.ci/setup environment
	@mkdir -p $(@D) && touch $@

$(STAMPS)/model: $(STAMPS)/environment
	@.ci/setup model
	@touch $@

# The module is no target of its own since its name carries the Python version; without one, build it.
$(STAMPS)/core: $(STAMPS)/environment $(NATIVE_SOURCES) $(if $(NATIVE_MODULE),,no-module)
	@.ci/setup core
	@touch $@

.PHONY: no-module
no-module:
