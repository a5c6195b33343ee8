# Every target makes .venv by itself when it is missing or older than the lock.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORES ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
SNAKEMAKE := $(BIN)/snakemake --cores $(CORES)
STORE ?= results/store
# Files that are written by Python must not depend on the locale, nor libraries on a home that can't be written.
export PYTHONUTF8 := 1

.PHONY: help setup demo kang unlock verify test test-fast test-kill test-slurm lint format
.PHONY: bench bench-elbo bench-differential bench-gap bench-gpu bench-label-transfer bench-mapping bench-quality
.PHONY: bench-training
.PHONY: bench-kang bench-loader bench-limits bench-loader-scale clean

help: ## what there is to make
	@grep -hE '^[a-z-]+:.*## ' Makefile | awk -F':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

setup: $(VENV)/.demo ## the virtual environment that runs the workflow

# torch comes first, so that nothing that depends on it picks another build.
$(VENV)/.demo: requirements.lock pyproject.toml
	test -x "$(BIN)/python" || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $$(grep '^torch==' requirements.lock)
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable .
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable ".[test,slurm]"
	touch $@

$(VENV)/.peers: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable ".[peers]"
	touch $@

demo: setup ## the workflow on a simulated cohort, to results/report/index.html
	$(SNAKEMAKE)
	@echo "The report: results/report/index.html"

kang: setup ## the workflow on the cohort of Kang et al. 2018 (needs a network), in runs/kang
	mkdir -p runs/kang
	$(SNAKEMAKE) --directory runs/kang --configfile config/config.yaml config/kang.yaml
	@echo "The report: runs/kang/results/report/index.html"

unlock: setup ## take away the lock that a killed run left behind
	$(BIN)/snakemake --unlock

verify: setup ## read all stores under results/store, or STORE=path, and name what is damaged and how to repair it
	$(BIN)/python -m cohortvi.store.verify "$(STORE)"

# Two processes, each with whole files, since their fixtures are long.
TWO := -n 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.test ## all tests
	$(BIN)/python -m pytest $(TWO)

test-fast: $(VENV)/.test ## the tests that take seconds
	$(BIN)/python -m pytest $(TWO) -m "not slow"

test-kill: $(VENV)/.test ## kill -9 during every rule of the demo; the results must not differ
	$(BIN)/python -m pytest tests/test_kill.py --kills 20

test-slurm: $(VENV)/.test ## the demo on a real Slurm on this machine (root, Debian)
	tests/slurm/start.sh
	COHORTVI_SLURM=1 $(BIN)/python -m pytest -m slurm tests; status=$$?; tests/slurm/stop.sh; exit $$status

lint: $(VENV)/.test ## style of Python, Snakemake and English
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/codespell
	$(BIN)/snakemake --lint

format: $(VENV)/.test ## bring the code into form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile workflow

bench-kang: $(VENV)/.peers ## our model beside scvi-tools on the cohort of Kang et al. (COHORTVI_TEST_DATA)
	$(BIN)/python benchmarks/kang.py

bench-elbo: $(VENV)/.peers ## seconds to scvi-tools' own held-out ELBO, and the final one (COHORTVI_TEST_DATA); hours
	$(BIN)/python benchmarks/time_to_elbo.py

bench-differential: $(VENV)/.peers ## differential expression where the changes are known, beside scvi-tools; an hour
	$(BIN)/python benchmarks/differential.py

bench-label-transfer: $(VENV)/.peers ## labels of donors without any, beside scANVI; an hour
	$(BIN)/python benchmarks/label_transfer.py

bench-mapping: $(VENV)/.peers ## new batches mapped onto a model by surgery or not (COHORTVI_TEST_DATA); ten minutes
	$(BIN)/python benchmarks/mapping.py

bench-gap: $(VENV)/.peers ## how far the posterior can be trusted on Kang et al., and on a type that was left out
	$(BIN)/python benchmarks/gap_table.py

bench-quality: $(VENV)/.peers ## quality beside scvi-tools, PCA and Harmony on four cohorts (COHORTVI_TEST_DATA); hours
	$(BIN)/python benchmarks/quality.py

bench-training: $(VENV)/.peers ## training steps and what a trained model is asked, beside scvi-tools
	$(BIN)/python benchmarks/training_speed.py

bench-gpu: $(VENV)/.peers ## training on one GPU beside scvi-tools on it: cells/s and held-out ELBO; ten minutes
	$(BIN)/python benchmarks/gpu.py

bench: $(VENV)/.test ## speed and memory of every rule up to the shards (benchmarks/)
	$(BIN)/python benchmarks/scale.py

bench-loader: $(VENV)/.test ## our loader beside annbatch, scDataset, scvi-tools and scipy; about an hour (python3.12)
	$(BIN)/python benchmarks/loader_speed.py
	$(BIN)/python benchmarks/loader_speed.py --tables

bench-limits: $(VENV)/.test ## what this machine allows the loader stage by stage, and how much of it is reached
	$(BIN)/python benchmarks/limits.py

bench-loader-scale: $(VENV)/.test ## the loader on 10 million cells: to open, to begin, speed and memory (2 GB of disk)
	$(BIN)/python benchmarks/scale_loader.py

clean: ## remove results, logs and demo data; .venv stays
	rm -rf results resources logs benchmarks/out runs .snakemake
