# The targets that people and CI both use. Everything happens in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SLURM_PACKAGES := slurmctld slurmd slurmdbd slurm-client slurm-wlm-basic-plugins slurm-wlm-mysql-plugin munge mariadb-server iproute2
# What reads our metrics and our pages, in tests.
READER_PACKAGES := prometheus chromium
PACKAGES := $(SLURM_PACKAGES) $(READER_PACKAGES)

SHARDS := long-trainer long-slurm long-chaos long-campaign

.PHONY: env demo test announce test-long $(SHARDS) lint packages unit bench clean

env: $(STAMP)  ## .venv with everything in it

# pip compiles on one core; compileall uses all of them. Do not leave it out: where PYTHONDONTWRITEBYTECODE is set, every
# process would compile what it imports. Packages contain files that cannot be compiled (templates): not an error.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@

demo: env  ## two local nodes, one language model, a visibly lower loss
	@BIN=$(BIN) sh examples/stdlib-lm/demo.sh

# Two groups of tests at a time (files, or what shares a cluster), in the order of pyproject's testpaths: the longest begins first.
PYTEST := $(BIN)/pytest -n 2 --dist loadgroup --no-loadscope-reorder --durations 20

test: announce env packages  ## the gate: tests that every change must pass (10 to 20 minutes; the Slurm tests need root and Debian's packages)
	$(PYTEST) -m "not long"

announce:
	@echo "make test: installs Python packages into $(VENV) (about 2.5 GB) and, as root or with passwordless sudo, these Debian"
	@echo "packages: $(PACKAGES)."
	@echo "The tests take 10 to 20 minutes on two cores. Without root, tests that need Slurm are skipped."

# Tests that are not part of the gate, in shards that can run alone (CONTRIBUTING.md says when to run which).
test-long: $(SHARDS)  ## all tests that are not part of the gate, shard by shard (hours)

long-trainer: env packages  ## the trainer under every plan, the examples, the observers
	$(PYTEST) -m long tests/integration

long-slurm: env packages  ## Slurm's refusals, the sandbox, the doctor
	$(PYTEST) -m long tests/slurm

long-chaos: env packages  ## each fault alone
	$(PYTEST) -m long tests/chaos

long-campaign: env packages  ## 100 random faults with a fixed seed, and their ledger
	BIN=$(BIN) sh tests/chaos/campaign.sh 100 7

unit: env  ## the tests that need nothing, in seconds
	$(BIN)/pytest tests/unit

lint: env  ## style, types, imports between packages, undeclared dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/deptry .

bench: env packages  ## bring-up and recovery beside their peers, as ratios (about 25 minutes)
	$(BIN)/python -m benchmarks.bringup
	$(BIN)/python -m benchmarks.recovery

# Debian's packages where we may install them; else a line that says how to get them.
packages:
	@missing=; for command in slurmctld slurmd munged ip prometheus chromium; do \
		command -v $$command > /dev/null 2>&1 || missing="$$missing $$command"; done; \
	if [ -z "$$missing" ]; then :; \
	elif ! command -v apt-get > /dev/null; then \
		echo "Tests will be skipped that need:$$missing (Debian or Ubuntu have them)."; \
	elif [ "$$(id -u)" = 0 ]; then \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $(PACKAGES); \
	elif sudo -n true 2> /dev/null; then \
		sudo apt-get update -q && sudo DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $(PACKAGES); \
	else \
		echo "Tests will be skipped that need:$$missing: run \`apt-get install $(PACKAGES)\` as root, then \`make test\` as root."; \
	fi

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache
