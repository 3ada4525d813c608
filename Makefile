# The targets that people and CI both use. Everything happens in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SLURM_PACKAGES := slurmctld slurmd slurmdbd slurm-client slurm-wlm-basic-plugins slurm-wlm-mysql-plugin munge mariadb-server iproute2

.PHONY: env demo test lint slurm-packages unit bench clean

env: $(STAMP)  ## .venv with everything in it

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: env  ## two local nodes, one language model, a visibly lower loss
	@BIN=$(BIN) sh examples/stdlib-lm/demo.sh

test: env slurm-packages  ## all tests; the Slurm ones where root and Debian's packages can be had
	$(BIN)/pytest

unit: env  ## the tests that need nothing, in seconds
	$(BIN)/pytest tests/unit

lint: env  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: env slurm-packages  ## bring-up beside its peers, as ratios
	$(BIN)/python -m benchmarks.bringup

# Slurm's packages where we may install them; else a line that says how to get them.
slurm-packages:
	@if command -v slurmctld slurmd munged ip > /dev/null 2>&1; then :; \
	elif ! command -v apt-get > /dev/null; then \
		echo "The Slurm tests will be skipped: they need Debian's or Ubuntu's Slurm packages."; \
	elif [ "$$(id -u)" = 0 ]; then \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $(SLURM_PACKAGES); \
	elif sudo -n true 2> /dev/null; then \
		sudo apt-get update -q && sudo DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $(SLURM_PACKAGES); \
	else \
		echo "The Slurm tests will be skipped: run \`apt-get install $(SLURM_PACKAGES)\` as root, then \`make test\` as root."; \
	fi

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache
