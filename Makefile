# One virtual environment, .venv, serves the quickstart, the tests and CI.
#
#   make quickstart    from a fresh clone to a report: installs, then runs every stage on the bundled task
#   make test          the whole test suite
#   make soak          runs killed, stopped and damaged at points drawn with a fixed seed: half an hour
#   make lint          ruff, check and format
#   make results       fails where a table of RESULTS.md is not what results/ holds
#   make venv          the environment alone
#   make system-deps   Debian packages that some tests need (Slurm, munge, Chromium), as root or with sudo
#
# Options: PYTHON=python3.12 chooses the interpreter;
# TORCH_INDEX=https://download.pytorch.org/whl/cpu takes PyTorch without CUDA, a far smaller download.

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
DEBIAN_PACKAGES := slurmctld slurmd slurm-client munge chromium

.PHONY: venv quickstart test soak lint results system-deps

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("$(PYTHON) is Python %d.%d; 3.11 or newer is needed. Set PYTHON=python3.11, say." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install $(addprefix --extra-index-url ,$(TORCH_INDEX)) -c constraints.txt -e '.[test]'
	@touch $@

quickstart: venv
	$(VENV)/bin/accelerate launch launch/train.py --config configs/quickstart.yaml

test: venv
	$(VENV)/bin/python -m pytest

soak: venv
	$(VENV)/bin/python -m tests.soak.faults

lint: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

results: venv
	$(VENV)/bin/python launch/results.py

# Says nothing and asks no server where all are installed.
system-deps:
	@dpkg-query --show --showformat='$${db:Status-Status}\n' $(DEBIAN_PACKAGES) 2>&1 | grep -qv '^installed$$' || exit 0; \
	if [ "$$(id -u)" = 0 ]; then as_root=; else as_root=sudo; fi; \
	$$as_root apt-get update && \
	$$as_root env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends $(DEBIAN_PACKAGES)
