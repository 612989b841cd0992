# The verbs of this project. `bench` and `test` set up .venv when it is missing and reuse it afterwards.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
OUT ?= benchmarks/results
HOST_verl := verl==0.9.1 cachetools TransferQueue fastapi uvicorn pyzmq msgspec
HOST_swift := ms-swift==4.6.0 msgspec

.PHONY: bench test test-trl test-verl test-swift check fuzz sanitize leaks docs tables package repro aot gpu clean

bench: $(VENV)/ready
	$(RUN) benchmarks/bench_rlsd_loss.py $(ARGS)

# One process a core, each of one thread; neighbours stay together, which share models and ranks. The interpreter is slow:
# it runs every tenth of a test's cases, and all of them with SAMPLE=1, as a GPU does.
SAMPLE ?= 10
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist worksteal

test: $(VENV)/ready
	$(PYTEST) $(ARGS)
	TRITON_INTERPRET=1 $(PYTEST) --sample $(SAMPLE) $(ARGS)

# Inside other trainers. verl and ms-swift want transformers of their own, and so environments of their own.
test-trl: $(VENV)/ready
	$(PYTEST) tests/test_trl_rlsd.py tests/test_trl_trainers.py tests/test_trl_distributed.py tests/test_guides.py $(ARGS)

test-verl: .venv-verl/ready
	OMP_NUM_THREADS=1 .venv-verl/bin/python -m pytest tests/test_verl.py tests/test_verl_engine.py $(ARGS)

test-swift: .venv-swift/ready
	OMP_NUM_THREADS=1 .venv-swift/bin/python -m pytest tests/test_swift.py $(ARGS)

.venv-%/ready: pyproject.toml $(VENV)/ready
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install -q torch==2.13.0
	.venv-$*/bin/python -m pip install -q "setuptools>=77"
	.venv-$*/bin/python -m pip install -q $(HOST_$*) pytest hypothesis
	.venv-$*/bin/python -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

check: $(VENV)/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror csrc/*.* csrc/cpu/*.*
	$(RUN) -m mypy
	$(RUN) -m sphinx -q -W --keep-going -b html docs docs/_build

# Thousands of random calls against float64; 10,000 of them in flat memory.
fuzz: $(VENV)/ready
	$(PYTEST) --hypothesis-profile=long tests/test_fuzz.py $(ARGS)

leaks: $(VENV)/ready
	$(RUN) tests/leaks.py $(ARGS)

# The C++ built with AddressSanitizer and UndefinedBehaviorSanitizer, under the tests that call it.
SANITIZED := kernels truncated_kernels opsd_kernels masses replay ssd_rows opsd_rows fuzz
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined
sanitize: $(VENV)/ready
	rm -rf build/sanitize
	CXXFLAGS="$(SANITIZERS) -fno-omit-frame-pointer -O1 -g" LDFLAGS="$(SANITIZERS)" $(RUN) setup.py -q build --build-base build/sanitize --build-lib build/sanitize
	nm -D build/sanitize/sdkernels/_C*.so | grep -q __asan_report
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		PYTHONPATH=build/sanitize OMP_NUM_THREADS=1 $(RUN) -P -m pytest -n auto --dist worksteal \
		$(SANITIZED:%=tests/test_%.py) $(ARGS)

# The site of README and docs/, in docs/_build; a warning is an error.
docs: $(VENV)/ready
	$(RUN) -m sphinx -q -W --keep-going -b html docs docs/_build

# The tables of README and docs/performance.md: what works where, and benchmarks/results.
tables: $(VENV)/ready
	$(RUN) -m benchmarks.tables
	PYTHONPATH=. $(RUN) tests/support_matrix.py

# Source distribution and, built from it, the abi3 wheel, into dist; then the wheel where there is no source or compiler.
package: $(VENV)/ready
	rm -rf dist build/clean
	$(RUN) -m build -n -o dist . > /dev/null
	$(PYTHON) -m venv build/clean
	build/clean/bin/python -m pip install -q torch==2.13.0
	build/clean/bin/python -m pip install -q dist/*-abi3-*.whl
	CC=false CXX=false build/clean/bin/python -I tests/smoke.py README.md

# Both trainers on their testbeds, beside the papers' claims: runs/repro. ARGS=--quick for minutes instead of an hour and a half.
repro: $(VENV)/ready
	$(RUN) -m trainers.repro $(ARGS)

aot: $(VENV)/ready
	$(RUN) tests/aot.py $(ARGS)

# On a machine with a GPU, with its own torch and Triton and no network: tests, then the benchmarks, results into OUT.
gpu:
	$(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -c "import torch; torch.cuda.get_device_name()"
	$(PYTHON) -m pytest -q $(ARGS)
	for name in rlsd_loss ssd_loss truncation opsd_loss linear; do \
		PYTHONPATH=. $(PYTHON) benchmarks/bench_$$name.py --device cuda --json $(OUT)/$$name.json --plot $(OUT)/$$name.png || exit 1; \
	done

clean:
	rm -rf $(VENV) .venv-verl .venv-swift build *.egg-info sdkernels/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and exactly, so that nothing else brings a CUDA build; Triton and Liger without their own wish for one.
$(VENV)/ready: pyproject.toml setup.py $(wildcard csrc/*.* csrc/cpu/*.*)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q torch==2.13.0
	$(RUN) -m pip install -q "setuptools>=77"
	$(RUN) -m pip install -q --no-build-isolation -e ".[dev]"
	$(RUN) -m pip install -q --no-deps triton==3.7.1 liger-kernel==0.8.5
	ls sdkernels/_C*.so
	touch $@
