# `make demo` shows what pessa does on a real model; `make check` is for working, `make test` runs every check there is.
# Real models are cached outside the clone, in $PESSA_CACHE (default ~/.cache/pessa/models).

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
MODEL = models/whisper-tiny.en
CLIP = models/speech/beckett.wav
THRESHOLDS = --qk-thr 5e-3 --vo-thr 6e-3
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo check test lint clean

demo: $(VENV)/.demo
	$(BIN)/python scripts/fetch_models.py whisper-tiny.en speech
	$(BIN)/pessa inspect $(MODEL) $(THRESHOLDS)
	$(BIN)/pessa prune $(MODEL) $(THRESHOLDS) -o out/whisper-tiny.en --force
	$(BIN)/pessa verify $(MODEL) out/whisper-tiny.en --audio $(CLIP) --tolerance 0.02

check: lint ## the checks for working: ruff, mypy and the fast tests, in a minute, without downloads
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not slow and not real"

test: lint ## every check there is; fetches real models the first time
	$(BIN)/python scripts/fetch_models.py --all
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

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
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) out
