# GNU make; `make help` lists the targets. PYTHON=... picks the interpreter of a new environment.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
SUDO := $(if $(filter-out 0,$(shell id -u)),sudo)
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
STAMP := $(VENV)/.stasc-installed

VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_STAMP := $(VLLM_VENV)/.stasc-installed

FLOORS_VENV ?= .venv-floors
FLOORS_BIN := $(FLOORS_VENV)/bin
FLOORS_STAMP := $(FLOORS_VENV)/.stasc-installed

COLAB_VENV ?= .venv-colab
COLAB_BIN := $(COLAB_VENV)/bin
COLAB_STAMP := $(COLAB_VENV)/.colab-installed

LATEST_VENV ?= .venv-latest
LATEST_BIN := $(LATEST_VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help env demo test test-browser test-vllm test-floors test-latest test-colab test-ray bench export readme docs lab clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

env: $(STAMP) ## set up .venv with the versions of constraints.txt

$(STAMP): setup.py settings.ini pyproject.toml constraints.txt
	test -d $(BIN) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: env ## teach the embedded model on this computer: table and picture in runs/demo
	$(BIN)/stasc demo --out runs/demo

test: export HF_HUB_OFFLINE = 1
test: export OMP_NUM_THREADS = 1
test: env ## everything in step, every notebook runs, every test passes
	$(BIN)/python .ci/check.py
	$(BIN)/nbdev_test --n_workers 2 --do_print
	$(BIN)/python -m pytest tests -n 2 --dist loadfile

test-browser: export STASC_BROWSER = required
test-browser: env ## the browser, the report and the widgets in headless Chromium (Debian's; installed where missing)
	command -v chromium >/dev/null || { $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq chromium fonts-dejavu-core; }
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,browser]'
	$(BIN)/python -m pytest tests/browser

$(VLLM_STAMP): setup.py settings.ini pyproject.toml constraints-vllm.txt
	test -d $(VLLM_BIN) || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install -q --disable-pip-version-check -c constraints-vllm.txt torch
	$(VLLM_BIN)/python -m pip install -q --disable-pip-version-check --no-deps -r constraints-vllm.txt
	$(VLLM_BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	touch $@

test-vllm: export HF_HUB_OFFLINE = 1
test-vllm: export STASC_VLLM = required
test-vllm: $(VLLM_STAMP) ## the vLLM sampler on vLLM's CPU build, in one process and in Ray's actors, in .venv-vllm
	$(VLLM_BIN)/python -m pytest tests/vllm

$(FLOORS_STAMP): setup.py settings.ini pyproject.toml constraints-floors.txt
	test -d $(FLOORS_BIN) || $(PYTHON) -m venv $(FLOORS_VENV)
	$(FLOORS_BIN)/python -m pip install -q --disable-pip-version-check -c constraints-floors.txt torch
	$(FLOORS_BIN)/python -m pip install -q --disable-pip-version-check --no-deps -r constraints-floors.txt
	$(FLOORS_BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	touch $@

test-floors: export HF_HUB_OFFLINE = 1
test-floors: export OMP_NUM_THREADS = 1
test-floors: $(FLOORS_STAMP) ## the tests with the oldest releases that settings.ini allows, in .venv-floors (PYTHON picks the interpreter; gigabytes)
	$(FLOORS_BIN)/python -m pytest tests -n 2 --dist loadfile

test-latest: export OMP_NUM_THREADS = 1
test-latest: ## the tests with today's newest releases, in .venv-latest (PYTHON picks the interpreter; gigabytes)
	test -d $(LATEST_BIN) || $(PYTHON) -m venv $(LATEST_VENV)
	$(LATEST_BIN)/python -m pip install -q --disable-pip-version-check --upgrade --upgrade-strategy eager -e '.[dev]'
	HF_HUB_OFFLINE=1 $(LATEST_BIN)/python -m pytest tests -n 2 --dist loadfile

$(COLAB_STAMP): constraints-colab.txt
	test -d $(COLAB_BIN) || $$(command -v python3.13 || echo $(PYTHON)) -m venv $(COLAB_VENV)
	$(COLAB_BIN)/python -m pip install -q --disable-pip-version-check -c constraints-colab.txt $$(sed 's/[#=].*//' constraints-colab.txt | grep -v '^nvidia\|^cuda')
	touch $@

test-colab: export OMP_NUM_THREADS = 1
test-colab: $(COLAB_STAMP) ## the Colab notebook with Colab's versions: it installs stasc itself, and changes none of torch, numpy, ... (gigabytes)
	$(COLAB_BIN)/python bench/colab.py

test-ray: env ## sweeps and runs on a Ray cluster of two nodes (installs the extra ray into .venv)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[ray]'
	OMP_NUM_THREADS=1 RAY_raylet_start_wait_time_s=120 $(BIN)/python -m pytest tests/test_cluster.py

bench: export HF_HUB_OFFLINE = 1
bench: env ## sampling, fine-tuning, plan and loop against what one would use otherwise: tables in bench/results (half an hour)
	for b in sample train plan loop; do $(BIN)/python bench/$$b.py || exit; done

export: env ## clean the notebooks and write the modules from them
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	cp _quarto.yml nbs/_quarto.yml

readme: env ## write README.md from nbs/index.ipynb
	$(BIN)/python .ci/readme.py

docs: env ## the site in _docs; rendered by Quarto (https://quarto.org), which must be on the PATH
	$(BIN)/python .ci/docs.py

lab: env ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab nbs

clean: ## remove what builds and tests leave behind; runs/ and .venv* stay
	rm -rf build dist *.egg-info _docs _proc .pytest_cache .hypothesis
	find stasc nbs tests .ci -name __pycache__ -prune -exec rm -rf {} +
	find nbs -name .ipynb_checkpoints -prune -exec rm -rf {} +
