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
# Flower holds typer, rich, protobuf and Ray back, and its typer warns beside a new click, which fails tests. So it has an
# environment of its own, which sees all of the first one behind what Flower needs in other versions.
FLOWER := $(VENV)/flower

.PHONY: help setup chromium demo federated test test-all conformance check format bench-speed bench-speed-full bench-speed-gpu bench-forgetting bench-forgetting-quick bench-completion bench-completion-quick bench-privacy bench-privacy-quick clean

help:
	@echo "make demo         adapt a small vision transformer to rotated digits, LoRA against NB-LoRA"
	@echo "make federated    federated rounds, NB-LoRA against Flower's own private strategy, half an hour"
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
	@echo "make bench-privacy-quick     accuracy of private merging against clipping, minutes, with the gates"
	@echo "make bench-privacy           the same for every budget, split and method, an hour; resumable"
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

# pip reports conflicts here, since it cannot put back what belongs to the first environment: they do no harm
$(FLOWER)/.ready: $(READY)
	$(BIN)/python -m venv $(FLOWER)
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
	  > "$$($(FLOWER)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/first-environment.pth"
	$(FLOWER)/bin/python -m pip install --quiet 'flwr[simulation]==1.42.0; python_version >= "3.11"'
	touch $@

# for the tests of the reports, which skip themselves without a browser
chromium:
	@if command -v chromium google-chrome >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; then :; \
	else echo "no Chromium here: the browser tests will be skipped"; fi

demo: $(READY)
	$(BIN)/nblora demo --out nblora-demo

federated: $(FLOWER)/.ready
	cd examples/federated && $(abspath $(FLOWER))/bin/python compare.py

test: $(READY) $(APART)/.ready $(FLOWER)/.ready chromium
	$(BIN)/python -m pytest -n auto -m "not slow"
	PYTHONPATH=$(APART) $(BIN)/python -m pytest -n auto -m "not slow" tests/test_quantized.py
	$(FLOWER)/bin/python -m pytest -m "not slow" tests/test_federated_flower.py || [ $$? = 5 ] # without Flower: none

test-all: $(READY) $(APART)/.ready $(FLOWER)/.ready chromium conformance
	$(BIN)/python -m pytest -n auto
	PYTHONPATH=$(APART) $(BIN)/python -m pytest -n auto tests/test_quantized.py
	PYTHONPATH=$(APART) $(BIN)/python -m pytest tests/test_deepspeed.py
	$(FLOWER)/bin/python -m pytest tests/test_federated_flower.py || [ $$? = 5 ]

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

bench-privacy-quick: $(READY)
	$(BIN)/python benchmarks/privacy.py --quick

bench-privacy: $(READY)
	$(BIN)/python benchmarks/privacy.py --json benchmarks/results/privacy.json --resume

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis nblora-demo tests/conformance/cache
