# The two commands of the README are `make chat` and `make test`; both work from an empty clone.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
NATIVE_SOURCES := $(sort $(shell find native -path native/tests -prune -o \( -name '*.cpp' -o -name '*.h' \) -print))
FORMATTED := $(NATIVE_SOURCES) $(sort $(wildcard native/tests/*.cpp native/tests/*.h))
# Keeps pip's advice to update itself out of the way.
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip
# Words of a person pass through the environment, as they are: neither make nor the shell reads their quotes and dollars.
export MINICPM_MAKE_PROMPT := $(value PROMPT)
export MINICPM_MAKE_MODEL := $(or $(value MODEL),smollm2)

.DELETE_ON_ERROR:
.PHONY: chat test test-all check fix bench web clean

chat: $(VENV)/.installed
	@if [ -n "$$MINICPM_MAKE_PROMPT" ]; then exec $(BIN)/minicpm chat -- "$$MINICPM_MAKE_MODEL" "$$MINICPM_MAKE_PROMPT"; \
	else exec $(BIN)/minicpm chat -- "$$MINICPM_MAKE_MODEL"; fi

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow"

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(FORMATTED),$(BIN)/clang-format --dry-run --Werror $(FORMATTED))

fix: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(FORMATTED),$(BIN)/clang-format -i $(FORMATTED))

bench: $(VENV)/.dev
	$(BIN)/python -m bench

# The built pages are committed, so that nobody needs node to install; after a change under web/ this builds them again.
web: web/node_modules/.installed
	npm run --prefix web build

web/node_modules/.installed: web/package.json web/package-lock.json
	npm ci --prefix web
	@touch $@

clean:
	rm -rf build $(VENV) web/node_modules

# What is missing is said in one line, before pip says it in a hundred.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: no Python found; install Python 3.11 or later, or set PYTHON=" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is older than 3.11; set PYTHON= to a later one" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null || { \
	  echo "error: $(PYTHON) has no venv or no headers; on Debian: apt install python3-venv python3-dev" >&2; exit 2; }
	@command -v c++ g++ clang++ >/dev/null || { \
	  echo "error: no C++ compiler found; on Debian: apt install g++" >&2; exit 2; }
	@$(PYTHON) -m venv --clear $(VENV)

# The stamps are touched last, so that an interrupted install is not taken for a finished one.
$(VENV)/.installed: pyproject.toml CMakeLists.txt $(NATIVE_SOURCES) native/CMakeLists.txt | $(BIN)/python
	@echo "installing minicpm into $(VENV) and compiling its engine, once: about two minutes" >&2
	@$(PIP) install --quiet --editable . >&2
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	@echo "installing the tools of the tests into $(VENV), once: about five minutes, most of it PyTorch" >&2
	@$(PIP) install --quiet --editable ".[dev]" >&2
	@touch $@
