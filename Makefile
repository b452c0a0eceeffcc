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

# A worker a core; tests of a file stay together, as they share what is made for them.
PYTEST := $(BIN)/python -m pytest -q -n logical --maxprocesses 8 --dist loadscope --no-loadscope-reorder
# What CPU kernels compute, once more as older CPUs run them.
VALUES := -m values -k "cpu or convolution or ulp or big" tests/ops

test: build lint
	$(BIN)/python -m tests.simt
	$(PYTEST) --durations=20
	PANSHARP_FAST_CPU_CAPABILITY=v3 $(PYTEST) $(VALUES)
	PANSHARP_FAST_CPU_CAPABILITY=baseline $(PYTEST) $(VALUES)

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
