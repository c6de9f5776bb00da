# Needs Python 3.11 to 3.13, git and make. Everything else is installed into .venv, from requirements.lock.
#
#   make repro   rebuild the default experiment: models, results, figures, notebooks
#   make study   and all that the study adds: baselines, budgets, ablations, capacities, verdicts
#   make smoke   the same pipeline, tiny, in a copy under .smoke/ that leaves your results alone
#   make tune    choose every method's settings anew, on validation prompts, with equal effort
#   make benchmark   time a training step next to TRL's own trainers
#   make test    the tests
#   make lint    ruff

PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1
export HF_HUB_OFFLINE := 1

.PHONY: setup repro study tune benchmark smoke test lint lab

setup: $(BIN)/.ready

$(BIN)/.ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

repro: setup
	./parallel.sh $(JOBS) data "theory supervised" train evaluate collect "figures theory-figures" notebook
	dvc repro
	cmdp report

study: repro
	cd study && ../parallel.sh $(JOBS) supervised arm && dvc repro
	cmdp report

tune: setup
	./parallel.sh $(JOBS) data supervised
	cd tuning && ../parallel.sh $(JOBS) trial && dvc repro

benchmark: setup
	cmdp benchmark

smoke: setup
	rm -rf .smoke && mkdir .smoke
	git ls-files --cached --others --exclude-standard -z | grep -zv -e '^results/' -e '^figures/' -e '^dvc.lock$$' \
		| tar --create --null --files-from - --ignore-failed-read | tar --extract --directory .smoke
	cmdp --overlay profiles/smoke.yaml overlay > .smoke/params.yaml
	cd .smoke && git init --quiet && export PYTHONPATH=$(CURDIR)/.smoke && \
		./parallel.sh $(JOBS) data "theory supervised" train evaluate && dvc repro && \
		cd study && ../parallel.sh $(JOBS) "arm@cmdp-k3 arm@cmdp-return-to-go"
	@echo "The pipeline ran: see .smoke/results and .smoke/figures."

test: setup
	pytest

lint: setup
	ruff check .
	ruff format --check .

lab: setup
	jupyter lab notebooks
