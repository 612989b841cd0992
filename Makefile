# The verbs of this project. `bench` and `test` set up .venv when it is missing and reuse it afterwards.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
OUT ?= benchmarks/results

.PHONY: bench test check repro aot gpu clean

bench: $(VENV)/ready
	$(RUN) benchmarks/bench_rlsd_loss.py $(ARGS)

test: $(VENV)/ready
	$(RUN) -m pytest $(ARGS)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto $(ARGS)

check: $(VENV)/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror csrc/*.* csrc/cpu/*.*
	$(RUN) -m mypy

# Both trainers on their testbeds, beside the papers' claims: runs/repro. ARGS=--quick for minutes instead of an hour.
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
	rm -rf $(VENV) build *.egg-info sdkernels/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
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
