# `make demo` runs everything; `make test` runs the fast tests.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
GPU_VENV := .venv-gpu
DOCS_VENV := .venv-docs
INSTALLED := $(VENV)/.installed

.PHONY: demo test check browser documents docs models night services interop bench scaling gpu arm repro plan ui clean

demo: $(INSTALLED)  ## run the whole pipeline with the default model: about 20 minutes on 2 cores
	@$(BIN)/python -m flows.democratize

test: $(INSTALLED)  ## run the fast tests: a tiny random model with the real tokenizer
	@$(BIN)/python -m pytest

check: $(INSTALLED)  ## check format, lint, types and import directions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

browser: $(INSTALLED)  ## test the pages in headless Chromium; on Debian: apt-get install chromium chromium-driver
	@$(BIN)/python -m pytest -m browser -n 0

night: $(VENV)/.team  ## kill, stop, starve and fan out whole flows: about an hour; LILLIPUT_KILLS=110 for many more
	@$(BIN)/python -m pytest -m night -n 1

services: $(VENV)/.team  ## test with PostgreSQL, S3, MLflow and Prefect servers; on Debian: apt-get install postgresql
	@$(BIN)/python -m pytest -m services -n 0

documents: $(VENV)/.team  ## run the command blocks of README.md and docs/ (exceptions: tests/documents/test_command_blocks.py) with a tiny model; on Debian: apt-get install postgresql nginx-light openssl curl
	@$(BIN)/python -m pytest -m documents -n 0 -s

docs: $(INSTALLED) $(DOCS_VENV)/.installed  ## write the documentation to site/, after a check of all its links
	@$(BIN)/python -m scripts.command_reference
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --quiet
	@echo "site/index.html; with search: $(BIN)/python -m http.server --directory site"

models: $(INSTALLED)  ## try every family of models in every column, and write docs/models.md
	@$(BIN)/python -m pytest -m models -n 0

interop: $(INSTALLED)  ## open our export with the real auto-gptq, in its own environment
	test -d .venv-autogptq || $(PYTHON) -m venv .venv-autogptq
	.venv-autogptq/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==4.49.0 peft==0.14.0 \
		datasets==4.4.2 huggingface-hub==0.36.2 accelerate rouge gekko sentencepiece
	.venv-autogptq/bin/pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: auto-gptq==0.7.1
	LILLIPUT_AUTOGPTQ_PYTHON=$(CURDIR)/.venv-autogptq/bin/python $(BIN)/python -m pytest -m interop -n 0

bench: $(INSTALLED)  ## compare with peers, each in its own environment under .bench/; after `make demo`, about 40 minutes on 2 cores
	@$(BIN)/python -m benchmarks.environments
	@$(BIN)/python -m flows.deploy phone-4gb
	@$(BIN)/python -m flows.deploy phone-4gb --stop
	@$(BIN)/python -m benchmarks

repro: $(INSTALLED)  ## run the pipeline with DVC alone, without Prefect
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m dvc repro

plan: $(INSTALLED)  ## show what a run would do, and its predicted time and memory
	@$(BIN)/python -m flows.democratize --plan

scaling: $(INSTALLED)  ## measure how cost grows with rows, candidates, questions and versions (docs/scaling.md)
	@for each in data candidates questions registry chart; do $(BIN)/python -m benchmarks.scaling $$each || exit; done

# The GPU is looked for before anything is installed. With LILLIPUT_PYTHON, that interpreter's own torch must have CUDA.
gpu:  ## measure on an NVIDIA GPU, in its own environment: ten minutes; LILLIPUT_PYTHON=python3 uses an existing one
ifdef LILLIPUT_PYTHON
	@$(LILLIPUT_PYTHON) -m benchmarks.gpu
else
	@nvidia-smi --list-gpus 2>/dev/null | grep -q . || { echo "error: nvidia-smi finds no NVIDIA GPU on this machine; rehearse with $(BIN)/python -m benchmarks.gpu --rehearse"; exit 2; }
	@$(MAKE) --no-print-directory $(GPU_VENV)/.installed
	@$(GPU_VENV)/bin/python -m benchmarks.gpu
endif

arm: $(INSTALLED)  ## after `make demo`: compare the bundle's next tokens on an emulated ARM processor; on Debian 12: apt-get install --no-install-recommends qemu-user-static
	@$(BIN)/python -m benchmarks.arm

ui: $(INSTALLED)  ## open the MLflow UI on http://127.0.0.1:5000
	@$(BIN)/python -m tasks.registry.moved && $(BIN)/python -m mlflow ui --backend-store-uri sqlite:///mlruns/mlflow.db --port 5000

# Install torch first: gptqmodel is built from source and needs it.
$(INSTALLED): requirements.lock
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or run make PYTHON=…"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep -E '^(torch|setuptools|wheel)==' requirements.lock)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --requirement requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

# PyPI's torch for Linux has CUDA. Another index may have a build without it, so that is checked before the rest.
$(GPU_VENV)/.installed: requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or run make PYTHON=…"; exit 2; }
	$(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/pip install --quiet --disable-pip-version-check $$(grep -E '^(torch|numpy|setuptools|wheel)==' requirements.lock)
	@$(GPU_VENV)/bin/python -c 'import torch; assert torch.version.cuda' || { echo "error: pip installed a torch without CUDA; remove $(GPU_VENV), and run again without any package index but PyPI"; exit 2; }
	$(GPU_VENV)/bin/pip install --quiet --disable-pip-version-check --no-build-isolation --requirement requirements.lock \
		$$($(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["gpu"])')
	@touch $@

$(DOCS_VENV)/.installed: requirements-docs.lock
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or run make PYTHON=…"; exit 2; }
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/pip install --quiet --disable-pip-version-check --requirement requirements-docs.lock
	@touch $@

$(VENV)/.team: $(INSTALLED) requirements-team.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-team.lock
	@touch $@

clean:  ## remove models, reports and logs; keeps the DVC cache and MLflow's store
	rm -rf models compiled bundles data answers report logs workspaces .cache offload/*/
