# polopt: `make demo` trains a small language model and writes a report; `make test` runs the tests. Both install first.
PYTHON      ?= python3
VENV        ?= .venv
# Where to find torch: https://download.pytorch.org/whl/cpu is the small build for machines without a GPU.
TORCH_INDEX ?=
JOBS        ?= 2
PEERS       ?= .venv-peers
BENCH       ?=
PYTEST_ARGS ?=
MUTATE      ?=

DEMO_TASK   ?= text:spell_backward
DEMO_ARGS   ?= --seed 0
DEMO_OUT    ?= runs/demo

BIN   := $(VENV)/bin
PIP   := $(BIN)/python -m pip --disable-pip-version-check --quiet
STAMP := $(VENV)/.installed

.PHONY: help install demo test lint format types imports docs tables bench torture certify evidence mutate lock clean
help:
	@echo "make demo     install, train GRPO on $(DEMO_TASK), write a report"
	@echo "make test     install, run all tests"
	@echo "make install  create $(VENV) from the lock file; then $(BIN)/polopt --help"
	@echo "make lint format types imports docs tables bench torture certify evidence mutate lock clean"

install: $(STAMP)

# The lock file has hashes for everything but torch, which comes last: by then all that it shares with others is pinned.
$(STAMP): requirements.lock requirements-torch.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "polopt needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1 || echo absent); try: make PYTHON=python3.12"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing packages into $(VENV) ..."
	@$(PIP) install --require-hashes --no-deps -r requirements.lock
	@echo "installing torch (large; README.md says how to get the small build) ..."
	@$(PIP) install -r requirements-torch.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

demo: $(STAMP)
	@rm -rf $(DEMO_OUT)
	@$(BIN)/polopt train grpo $(DEMO_TASK) $(DEMO_ARGS) --out $(DEMO_OUT)

test: $(STAMP)
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

lint: $(STAMP)
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check --quiet .

format: $(STAMP)
	@$(BIN)/python -m ruff format --quiet .

types: $(STAMP)
	@$(BIN)/python -m mypy

imports: $(STAMP)
	@$(BIN)/lint-imports

docs: $(STAMP)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

tables: $(STAMP)
	@$(BIN)/python tests/docs/tables.py

# The peers live in an environment of their own; BENCH names the benchmarks to run (default: all).
bench: $(STAMP) $(PEERS)/.installed
	@PEER_PYTHON=$(PEERS)/bin/python $(BIN)/python benchmarks $(BENCH)

$(PEERS)/.installed: benchmarks/requirements.txt
	@$(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip --disable-pip-version-check --quiet install -r benchmarks/requirements.txt \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@touch $@

torture: $(STAMP)
	@$(BIN)/python -m pytest -m torture tests/torture $(PYTEST_ARGS)

# Methods' small experiments: what is missing or stale; resumes, one run per core.
evidence: $(STAMP)
	@$(BIN)/polopt evidence --all

# Faults are seeded into src/polopt/parts; MUTATE chooses some by file, kind or id ("--only gae sign").
mutate: $(STAMP)
	@$(BIN)/python tests/mutation/run.py --jobs $(JOBS) --json evidence/mutation.json $(MUTATE)

# Everything that is proven about each method, anew; the certificates lie in evidence/certificates, docs/papers.md shows them.
certify: $(STAMP)
	@$(BIN)/polopt certify --all --jobs $(JOBS); status=$$?; $(BIN)/python tests/docs/tables.py; exit $$status

lock:
	@.ci/lock

clean:
	@rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
