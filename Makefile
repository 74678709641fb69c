# `make demo` shows what pessa does on a real model; `make check` is for working, `make test` runs every check there is.
# `make help` lists all targets: those with a comment behind two number signs.
# Real models are cached outside the clone, in $PESSA_CACHE (default ~/.cache/pessa/models).

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
LOWEST = .venv-lowest
MODEL = models/whisper-tiny.en
CLIP = models/speech/beckett.wav
SOURCES = pessa_cli scripts tests
THRESHOLDS = --qk-thr 5e-3 --vo-thr 6e-3
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo check test test-lowest lint docs clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 13

demo: $(VENV)/.demo ## see what pessa does on a real model: inspect, prune, verify, transcribe
	$(BIN)/python scripts/fetch_models.py whisper-tiny.en speech
	$(BIN)/pessa inspect $(MODEL) $(THRESHOLDS)
	$(BIN)/pessa prune $(MODEL) $(THRESHOLDS) -o demo/whisper-tiny.en --force
	$(BIN)/pessa verify $(MODEL) demo/whisper-tiny.en --audio $(CLIP) --tolerance 0.02

check: lint ## run what is for working: ruff, mypy and the fast tests, without downloads
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not slow and not real"

test: lint docs ## run everything that CI runs, with the real models, which are fetched the first time
	$(BIN)/python scripts/fetch_models.py --all
	$(BIN)/python -m pytest

test-lowest: $(LOWEST)/.test ## run the tests of other libraries with the lowest versions that pyproject.toml names
	HF_HUB_OFFLINE=1 $(LOWEST)/bin/python -m pytest -m "libraries and not slow and not real" \
		--ignore=tests/docs --ignore=tests/exports/test_faster_whisper.py

lint: $(VENV)/.test ## run ruff and mypy
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

docs: $(VENV)/.docs ## build the documentation into site/, and fail on any warning
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "the documentation is in site/index.html"

# The stamps are made anew when what is to be installed changes.
$(VENV)/.demo: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "installing pessa and what it needs into $(VENV) (a few minutes the first time)"
	$(INSTALL) -e '.[whisper]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "installing pessa and what its tests need into $(VENV) (a few minutes the first time)"
	$(INSTALL) -e '.[dev]'
	touch $@ $(VENV)/.demo $(VENV)/.docs

$(LOWEST)/.test: pyproject.toml constraints-lowest.txt
	test -d $(LOWEST) || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt \
		-e '.[whisper,plot,gguf,tune]' jiwer pytest pytest-xdist hypothesis
	touch $@

$(VENV)/.docs: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "installing pessa and what its documentation needs into $(VENV) (a few minutes the first time)"
	$(INSTALL) -e '.[docs]'
	touch $@

clean: ## remove the virtual environment and what was built
	rm -rf $(VENV) $(LOWEST) demo site
