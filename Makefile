# Set-up and everyday tasks. `make demo` and `make test` need python3 >= 3.10, git, make and a network;
# as root on Debian they install the system packages that are missing, otherwise they name the command that does.

PYTHON ?= python3
BIN := .venv/bin
# Editable by a plain path entry: the default finder takes 15 ms at every start of Python.
INSTALL := $(BIN)/pip install --quiet --config-settings editable_mode=compat --editable
# An installed wheel comes compiled; an editable one is compiled at every start where PYTHONDONTWRITEBYTECODE is set.
COMPILE := $(BIN)/python -m compileall -q kbpf

# tcpdump brings libpcap, under the name that it has in this release.
TEST_PACKAGES := clang llvm libbpf-dev python3-bpfcc linux-headers-$(shell dpkg --print-architecture 2>/dev/null) \
	tcpdump iproute2 bpftool

.PHONY: demo test test-older lint format objects fuzz bench clean

demo: .venv/installed
	$(BIN)/python examples/demo.py

test: .venv/installed-dev
	tools/debian-packages $(TEST_PACKAGES)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-older: .venv/installed-dev
	tools/older-kernel $(PYTEST_ARGS)

lint: .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

objects:
	tools/debian-packages clang llvm libbpf-dev
	$(MAKE) -C c objects

fuzz: .venv/installed-dev
	KBPF_FUZZ=full $(BIN)/python -m pytest -m fuzz --timeout=0 -s

bench: .venv/installed-bench
	tools/debian-packages $(TEST_PACKAGES)
	@set -e; for question in benchmarks/*.py; do echo "== $$question"; $(BIN)/python $$question; done

# The stamps are newer than pyproject.toml when what it asks for is installed. The project itself is installed
# editable, so changed sources need no new set-up.
.venv/bin/pip:
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || tools/debian-packages python3-venv
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/pip
	$(INSTALL) .
	$(COMPILE)
	touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/pip
	$(INSTALL) '.[dev]'
	$(COMPILE)
	touch $@ .venv/installed

.venv/installed-bench: pyproject.toml | .venv/bin/pip
	$(INSTALL) '.[dev,bench]'
	touch $@ .venv/installed .venv/installed-dev

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
