PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test sanitize lint build clean format

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
VALUES := -m values -k "cpu or chroma or convolution or resample or ulp or big" tests/ops

test: build lint
	$(BIN)/python -m tests.simt
	$(PYTEST) --durations=20
	PANSHARP_FAST_CPU_CAPABILITY=v3 $(PYTEST) $(VALUES)
	PANSHARP_FAST_CPU_CAPABILITY=baseline $(PYTEST) $(VALUES)

# CPU kernels and the shim of the CUDA kernels under AddressSanitizer and UndefinedBehaviorSanitizer, by the operators'
# tests; not those of planted faults, which read where they should not.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1
sanitize: build
	PANSHARP_FAST_CUDA=0 PANSHARP_FAST_BUILD_DIR=build/sanitize/cmake CMAKE_ARGS=-DPANSHARP_FAST_SANITIZE=ON \
		$(BIN)/python setup.py -q build_ext --build-lib build/sanitize
	PANSHARP_FAST_LIBRARIES=$(CURDIR)/build/sanitize/pansharp_fast SIMT_FLAGS="$(SANITIZE)" \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 $(PYTEST) tests/simt tests/ops/test_conformance.py \
		tests/ops/test_chroma.py tests/ops/test_cm3a.py tests/ops/test_convolution.py tests/ops/test_frequency_attention.py \
		tests/ops/test_resample.py tests/ops/test_wavelet.py \
		-k "not planted and not noticed and not triton and not process and not compile and not beyond and not in_memory"

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
