# make profile   the operator profile on this machine        make test   the tests
# Each sets up what it needs in .venv once: Python 3.10 to 3.13, a C++ compiler, and pip are all it takes.
# Choose the interpreter or the torch: make test PYTHON=python3.12 TORCH=torch==2.11.0

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip install --quiet
export PATH := $(BIN):$(PATH)

SOURCES := $(shell find csrc -type f) setup.py
C_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.c')

.PHONY: profile test lint format report clean

profile: $(VENV)/built
	$(BIN)/python -m bench profile

test: $(VENV)/built
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(C_FILES)

format: $(VENV)/built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_FILES)

report: $(VENV)/built
	$(BIN)/python -m bench report

$(VENV)/ready: pyproject.toml
	@$(PYTHON) -c "import sys; v = sys.version_info[:2]; \
	    (3, 10) <= v <= (3, 13) or sys.exit(f'Python 3.10 to 3.13 is needed, {sys.executable} is ' \
	    f'{v[0]}.{v[1]}; pass another, make PYTHON=python3.12')"
	@echo "Installing $(TORCH) into $(VENV), once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip
	@$(PIP) '$(TORCH)' numpy setuptools wheel ninja pybind11
	@touch $@

$(VENV)/built: $(VENV)/ready $(SOURCES)
	@echo "Compiling the CPU kernels for each instruction set: some minutes, once"
	@$(PIP) --no-build-isolation --editable '.[bench,model,test,triton]'
	@touch $@

clean:
	rm -rf build $(VENV) *.egg-info mvsplit_ops/*.so
