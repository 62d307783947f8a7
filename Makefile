# Everything runs in .venv, made from requirements.lock (exact versions, checked by hash). `make help` lists the commands.
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
# The stamp's name holds a checksum of what the environment is made from: nothing is reinstalled until that changes.
STAMP  := $(VENV)/.installed-$(shell (pwd; cat requirements.lock pyproject.toml) | cksum | tr ' ' -)

export JUPYTER_PREFER_ENV_PATH := 1
export PYTHONNOUSERSITE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo smoke full test test-library test-notebooks lint format lab app setup lock clean

help: ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do printf '  make %-15s %s\n' "$$name" "$$text"; done

demo: setup ## set everything up and run the demo experiment (about 11 minutes on two cores)
	$(RUN) -m sptseg_lib run notebooks/pipelines/demo.yaml

smoke: setup ## the same pipeline in miniature (at most 3 minutes; scores mean nothing)
	$(RUN) -m sptseg_lib run notebooks/pipelines/smoke.yaml

full: setup ## the long experiment, meant for a GPU
	$(RUN) -m sptseg_lib run notebooks/pipelines/full.yaml

test: lint test-library test-notebooks ## set everything up and run every test

test-library: setup ## tests of the library alone
	$(RUN) -m pytest

test-notebooks: setup ## run every notebook and compare the outputs of marked cells
	$(RUN) -m pytest -p no:cacheprovider --nbval-lax --nbval-current-env --nbval-cell-timeout=600 notebooks

lint: setup ## ruff over modules and notebooks
	$(RUN) -m ruff check .

format: setup ## let ruff order and format the sources
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

lab: setup ## open JupyterLab on the notebooks
	$(RUN) -m jupyterlab notebooks

app: setup ## segment your own picture in the browser: notebook 07 without its lesson
	$(RUN) -m voila notebooks/07_segment_your_image.ipynb --TagRemovePreprocessor.enabled=True \
	  --TagRemovePreprocessor.remove_cell_tags=lesson \
	  --Voila.tornado_settings="{'websocket_max_message_size': 100_000_000}"

setup: $(STAMP) ## make the environment in .venv

$(STAMP): 
	@command -v '$(PYTHON)' >/dev/null || { \
	  echo "$(PYTHON) was not found; install Python 3.11, 3.12 or 3.13, or name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else \
	  "$(PYTHON) is Python %d.%d, but the locked versions are for 3.11 to 3.13; name another one: make PYTHON=python3.12" % v[:2])'
	@'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@echo "Setting up $(VENV): about 3 GB to download the first time, then nothing."
	'$(PYTHON)' -m venv $(VENV)
	$(RUN) -m pip install --require-hashes -r requirements.lock
	$(RUN) -m pip install --no-deps --no-build-isolation --editable .
	@rm -f $(VENV)/.installed-*
	@touch $@

lock: ## make requirements.lock and environment.yml anew from pyproject.toml (needs uv)
	$(PYTHON) data_scripts/lock.py

clean: ## remove the environment and what tools left behind; runs/ stays
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
