# Everything starts from nothing but Python >= 3.11 and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Quix Streams wants older versions of what we use: an environment of its own, for the bench only.
QUIX := $(VENV)/bench-quix
QUIX_READY := $(QUIX)/.ready

.PHONY: demo test lint unit integration bench bench-latency bench-quota bench-billing bench-recovery bench-memory \
  mutants simulate prove-metering prove-quota prove-billing lock clean

demo: $(READY)
	$(BIN)/meterline demo

# Two processes share the test modules, each with a stack of its own: most of a test's time it waits.
test: lint
	$(BIN)/pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder --durations=10 --durations-min=20

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/meterline schemas check

# The fast part: no process is started.
unit: $(READY)
	$(BIN)/pytest tests/unit tests/property

bench: $(READY) $(QUIX_READY)
	$(BIN)/python -m tests.bench.metering

# How long until an event that was published can be read in the ledger.
bench-latency: $(READY)
	$(BIN)/python -m tests.bench.latency

bench-quota: $(READY)
	$(BIN)/python -m tests.bench.quota

bench-billing: $(READY)
	$(BIN)/python -m tests.bench.billing

# Ten million ids and a million windows: some minutes, most of them to write what is then restored.
bench-recovery: $(READY)
	$(BIN)/python -m tests.bench.recovery

# Half an hour.
bench-memory: $(READY)
	$(BIN)/python -m tests.bench.memory

# Safeguards taken out of a copy, one at a time: each must turn a test red that counts credits.
mutants: $(READY)
	$(BIN)/python -m tests.mutants

# Five thousand histories of workers that die, sleep and lose answers, in virtual time: some minutes.
simulate: $(READY)
	$(BIN)/python -m tests.simulation

# A million events through two workers that are killed a hundred times, at every step; every credit is compared.
prove-metering: $(READY)
	$(BIN)/python -m tests.proof.metering

# Ten minutes: eight processes race for credits, are killed and stalled; Redis and Kafka are lost.
prove-quota: $(READY)
	$(BIN)/python -m tests.proof.quota

# A quarter of 500 clients by the sandbox's clock: billing workers are killed at every step, Stripe does its worst.
prove-billing: $(READY)
	$(BIN)/python -m tests.proof.billing

# Pinned with hashes, for every platform and Python from 3.11 on; no address of any index in it.
lock: $(READY)
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-emit-find-links --quiet \
	  --custom-compile-command "make lock" -o requirements.lock
	$(BIN)/uv pip compile tests/bench/quix-requirements.in --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-emit-find-links --quiet \
	  --custom-compile-command "make lock" -o tests/bench/quix-requirements.lock

$(QUIX_READY): $(READY) tests/bench/quix-requirements.lock
	@test -x $(QUIX)/bin/python || $(BIN)/python -m venv $(QUIX)
	$(QUIX)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes \
	  -r tests/bench/quix-requirements.lock
	@touch $@

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Meterline needs Python 3.11 or newer; this is $$($(PYTHON) --version). Set PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	$(BIN)/python -m meterline.metering.fast
	@touch $@

clean:
	rm -rf $(VENV)
