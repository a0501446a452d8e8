# Every target does its own set-up on a fresh clone: a virtual environment in .venv, torch pinned first
# (a range would pull several GB of CUDA packages), then this package with its development tools.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := torch==2.13.0
# Quantization and DeepSpeed: whoever imports transformers beside them pays seconds and gets their messages, so they
# are installed apart and only their own tests see them.
APART := $(VENV)/apart

.PHONY: help setup chromium demo test test-all conformance check format bench-speed bench-speed-full bench-speed-gpu bench-forgetting bench-forgetting-quick bench-completion bench-completion-quick clean

help:
	@echo "make demo         adapt a small vision transformer to rotated digits, LoRA against NB-LoRA"
	@echo "make test         the tests"
	@echo "make test-all     the tests, the slow ones and PEFT's own"
	@echo "make conformance  PEFT's own tests with NB-LoRA in place of its methods; PEFT=0.21.0 or PEFT=newest"
	@echo "make chromium     a browser for the tests of the reports (Debian, as root)"
	@echo "make check        formatting, lint and types"
	@echo "make format       format the code"
	@echo "make bench-speed  time and memory against PEFT's methods, minutes, with the targets"
	@echo "make bench-speed-full        the same on every axis, hours"
	@echo "make bench-speed-gpu         Llamas of 1 and 8 billion parameters on a GPU"
	@echo "make bench-forgetting-quick  what LoRA and NB-LoRA learn and forget, minutes, with gates"
	@echo "make bench-forgetting        every method on the full grid, hours; resumable"
	@echo "make bench-completion-quick  matrix completion against its peers, minutes, with the targets"
	@echo "make bench-completion        every task and method, three seeds, hours; resumable"
	@echo "make clean        remove the virtual environment and caches"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(APART)/.ready: $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --target $(APART) --upgrade --constraint constraints.txt \
	  bitsandbytes torchao hqq termcolor einops deepspeed hjson ninja py-cpuinfo
	touch $@

# for the tests of the reports, which skip themselves without a browser
chromium:
	@if command -v chromium google-chrome >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; then :; \
	else echo "no Chromium here: the browser tests will be skipped"; fi

demo: $(READY)
	$(BIN)/nblora demo --out nblora-demo

test: $(READY) $(APART)/.ready chromium
	$(BIN)/python -m pytest -n auto -m "not slow"
	PYTHONPATH=$(APART) $(BIN)/python -m pytest -n auto -m "not slow" tests/test_quantized.py

test-all: $(READY) $(APART)/.ready chromium conformance
	$(BIN)/python -m pytest -n auto
	PYTHONPATH=$(APART) $(BIN)/python -m pytest -n auto tests/test_quantized.py
	PYTHONPATH=$(APART) $(BIN)/python -m pytest tests/test_deepspeed.py

conformance: $(READY)
	PYTHONPATH=tests $(BIN)/python -m conformance $(if $(PEFT),--peft $(PEFT))

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-speed: $(READY)
	$(BIN)/python benchmarks/speed.py --quick --json benchmarks/results/speed.json

bench-speed-full: $(READY)
	$(BIN)/python benchmarks/speed.py --full --json benchmarks/results/speed-full.json

bench-speed-gpu: $(READY)
	$(BIN)/python benchmarks/speed.py --gpu --json benchmarks/results/speed-gpu.json

bench-forgetting-quick: $(READY)
	$(BIN)/python benchmarks/forgetting.py --quick

bench-forgetting: $(READY)
	$(BIN)/python benchmarks/forgetting.py

# not in constraints.txt: only the benchmark needs them, and one that cannot be built here gets a row that says so
.PHONY: completion-peers
completion-peers: $(READY)
	@for peer in cmfrec scikit-surprise scikit-learn; do \
	  $(BIN)/python -m pip show --quiet $$peer 2>/dev/null || $(BIN)/python -m pip install --quiet $$peer || \
	  echo "$$peer cannot be installed here: the benchmark leaves it out"; \
	done

bench-completion-quick: completion-peers
	$(BIN)/python benchmarks/completion.py --quick

bench-completion: completion-peers
	$(BIN)/python benchmarks/completion.py --json benchmarks/results/completion.json --resume

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis nblora-demo tests/conformance/cache
