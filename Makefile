PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint build clean format

# The virtual environment: torch first (a CPU build of a fixed version), then the package, compiled in place.
$(STAMP): pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*/* csrc/*.cpp)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet "setuptools>=77" wheel cmake ninja pybind11
	$(BIN)/pip install --quiet --no-build-isolation --editable '.[dev,train,triton]'
	touch $(STAMP)

build: $(STAMP)

demo: build
	$(BIN)/pansharp-fast demo --out demo_output

# CPU kernels once more as older CPUs run them.
test: build lint
	$(BIN)/python -m pytest -q
	PANSHARP_FAST_CPU_CAPABILITY=v3 $(BIN)/python -m pytest -q tests/ops -k "cpu or convolution or ulp"
	PANSHARP_FAST_CPU_CAPABILITY=baseline $(BIN)/python -m pytest -q tests/ops -k "cpu or convolution or ulp"

lint: build
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*' 'tests/*.h' 'tests/*.cpp' | grep -E '\.(h|cpp|cu|cuh)$$')

format: build
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*' | grep -E '\.(h|cpp|cu|cuh)$$')

clean:
	rm -rf build dist *.egg-info $(VENV) demo_output pansharp_fast/*.so
