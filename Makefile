# Each target does everything it needs on a machine with Python, make and a C++ compiler. A second call is quick.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip

# What is built here has CUDA kernels for one architecture, where there is nvcc: three take minutes. Wheels have all.
export FUSEDOPT_CUDA_ARCHITECTURES ?= 90

.DELETE_ON_ERROR:
.PHONY: demo test test-all test-oldest lint rules bench gpu wheel sanitize neon

demo: $(VENV)/native
	$(BIN)/fusedopt demo $(DEMO_ARGS)

# In two processes at once.
test: $(VENV)/native
	$(BIN)/python -m pytest -n 2 $(TEST_ARGS)

test-all: $(VENV)/native
	$(BIN)/python -m pytest -n 2 -m "slow or not slow" $(TEST_ARGS)

# With the oldest torch that the package takes, in an environment of its own. One native module serves every torch.
OLDEST := .venv-oldest
OLDEST_TORCH := $(shell sed -n 's/^dependencies = .*"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml)
test-oldest: $(OLDEST)/installed
	@$(MAKE) --no-print-directory $(VENV)/native
	$(OLDEST)/bin/python -m pytest -n 2 $(TEST_ARGS)

bench: $(VENV)/native
	$(BIN)/fusedopt bench $(BENCH_ARGS)

# With the packages that are there, and no network. GPU_WHEELS: a directory of wheels to install beside them.
GPU_RESULTS ?= bench/results
gpu:
	$(PYTHON) bench/gpu.py --results $(GPU_RESULTS) $(if $(GPU_WHEELS),--wheels $(GPU_WHEELS)) $(GPU_ARGS)

# mypy knows nothing of package_dir, so it reads links laid out as the package is installed.
lint: $(VENV)/installed
	$(BIN)/ruff check .
	@rm -rf build/lint && mkdir -p build/lint/fusedopt
	@ln -s $(CURDIR)/fusedopt/* $(CURDIR)/bench $(CURDIR)/kernels build/lint/fusedopt
	cd build/lint && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml

# runpy would warn that the package has imported the module it is to run.
rules: $(VENV)/installed
	$(BIN)/python -W ignore::RuntimeWarning -m fusedopt.binding csrc/rules.h

# The wheel is built from the source distribution, so a file missing from that shows here.
wheel: $(VENV)/installed
	env -u FUSEDOPT_CUDA_ARCHITECTURES $(BIN)/python -m build --outdir dist

# torch first and alone, at the pinned version: resolved with the rest, a newer build could be taken.
# A stamp is a recipe's last line, so an aborted run leaves none; a half-made environment is made anew.
$(VENV)/installed: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fusedopt needs Python 3.10 or newer, not " \
		+ sys.version.split()[0] + ": make PYTHON=python3.12")'
	@$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) install -c constraints.txt torch
	FUSEDOPT_NATIVE=0 $(PIP) install -c constraints.txt -e ".[dev]"
	@touch $@

# Installing without the native module takes away the one in the checkout, which is then put back as it was built.
$(OLDEST)/installed: pyproject.toml setup.py
	@$(OLDEST)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(OLDEST)
	FUSEDOPT_NATIVE=0 $(OLDEST)/bin/python -m pip install torch==$(OLDEST_TORCH) -e ".[bench,test]"
	@rm -f $(VENV)/native
	@touch $@

# Built in place, in a build directory that stays. Without a compiler there is no module, and no stamp: one may come.
$(VENV)/native: $(VENV)/installed CMakeLists.txt $(shell find csrc -type f)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@test -z "$$(ls fusedopt/_native.*.so 2>/dev/null)" || touch $@

# Linux and GCC: the sanitizer's runtime must be loaded before Python, and is asked of the compiler.
# libstdc++ beside it lets the runtime see C++ exceptions. Python's own leaks at exit say nothing of the module.
SANITIZE_CXX ?= g++
sanitize: $(VENV)/installed
	$(call sanitized_build,asan,address$(comma)undefined)
	LD_PRELOAD="$(call runtime,libasan.so) $(call runtime,libstdc++.so)" FUSEDOPT_NATIVE_PATH=build/asan \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc \
	$(BIN)/python -m pytest -s tests/test_native*.py
	$(call sanitized_build,tsan,thread)
	LD_PRELOAD="$(call runtime,libtsan.so)" FUSEDOPT_NATIVE_PATH=build/tsan \
	TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=1 \
	setarch $$(uname -m) -R $(BIN)/python -m pytest -s tests/test_native*.py -k thread

comma := ,
runtime = $(shell $(SANITIZE_CXX) -print-file-name=$(1))
define sanitized_build
$(BIN)/cmake -S . -B build/$(1) -G Ninja -DCMAKE_CXX_COMPILER=$(SANITIZE_CXX) -DFUSEDOPT_SANITIZE=$(2) \
	-DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	-Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
$(BIN)/cmake --build build/$(1)
endef

# Debian: apt-get install g++-aarch64-linux-gnu qemu-user. The flags that decide a result are those of CMakeLists.txt.
NEON_CXX ?= aarch64-linux-gnu-g++
NEON_RUN ?= qemu-aarch64
KERNEL_FLAGS := -std=c++17 -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math -static
neon:
	@mkdir -p build/neon
	$(CXX) $(KERNEL_FLAGS) -DFUSEDOPT_ISA=baseline tests/kernels.cpp csrc/cpu/baseline.cpp -o build/neon/here
	$(NEON_CXX) $(KERNEL_FLAGS) -DFUSEDOPT_ISA=neon tests/kernels.cpp csrc/cpu/neon.cpp -o build/neon/there
	build/neon/here > build/neon/here.txt
	$(NEON_RUN) build/neon/there > build/neon/there.txt
	cmp build/neon/here.txt build/neon/there.txt
	@echo "neon: the same bits in $$(wc -l < build/neon/here.txt) lines"
