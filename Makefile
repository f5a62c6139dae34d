# make profile   measure the operator profile on this machine
# make test      run the tests
# make lint      check style and types: ruff, clang-format, mypy
# make format    fix what ruff and clang-format can fix
# make report    write bench/results/report.md and report.html, and the figures in the README files
#
# The first call creates .venv and compiles the CPU kernels, which takes some minutes. It needs Python
# 3.10 to 3.13, pip and a C++ compiler. To choose the interpreter or the version of torch:
# make test PYTHON=python3.12 TORCH=torch==2.11.0

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip install --quiet
export PATH := $(BIN):$(PATH)

SOURCES := $(shell find csrc -type f) setup.py
C_FILES := $(shell find csrc bench tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.c')

.PHONY: profile test lint format report clean

profile: $(VENV)/built
	$(BIN)/python -m bench profile

test: $(VENV)/built
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(C_FILES)
	$(BIN)/mypy

format: $(VENV)/built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_FILES)

report: $(VENV)/built
	$(BIN)/python -m bench report

$(VENV)/ready: pyproject.toml
	@$(PYTHON) -c "import sys; v = sys.version_info[:2]; \
	    (3, 10) <= v <= (3, 13) or sys.exit(f'mvsplit-ops needs Python 3.10 to 3.13, but {sys.executable} ' \
	    f'is {v[0]}.{v[1]}; choose another interpreter: make PYTHON=python3.12')"
	@echo "Installing $(TORCH) into $(VENV); this happens once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip
	@$(PIP) '$(TORCH)' numpy setuptools wheel ninja pybind11
	@touch $@

$(VENV)/built: $(VENV)/ready $(SOURCES)
	@echo "Compiling the CPU kernels for each instruction set; this happens once and takes some minutes"
	@$(PIP) --no-build-isolation --editable '.[bench,lint,model,test,triton]'
	@touch $@

clean:
	rm -rf build $(VENV) *.egg-info mvsplit_ops/*.so
