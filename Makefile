# The two commands of the README are `make chat` and `make test`; both work from an empty clone.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
NATIVE_SOURCES := $(wildcard native/*.cpp native/*.h native/*/*.cpp native/*/*.h)
FORMATTED := $(NATIVE_SOURCES)

.PHONY: chat test test-all check fix bench clean

chat: $(VENV)/.installed
	@$(BIN)/minicpm chat $(if $(MODEL),$(MODEL),smollm2) $(if $(PROMPT),"$(PROMPT)")

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
	@for file in bench/*.py; do $(BIN)/python $$file --quick || exit 1; done

clean:
	rm -rf build $(VENV)

# A name that vanishes on failure, so that an interrupted install is not taken for a finished one.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: pyproject.toml CMakeLists.txt $(NATIVE_SOURCES) native/CMakeLists.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@
