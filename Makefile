# Session 10. `make run` and `make test` do all their own set-up.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

export PYTHONUNBUFFERED := 1
export NO_ALBUMENTATIONS_UPDATE := 1

.PHONY: help setup run test lint bench fuzz clean

help:
	@echo "make run    set up, then execute the notebook (S10_PROFILE=quick or full)"
	@echo "make test   set up, then run every check"
	@echo "make lint   ruff's checks and formatting, without changing anything"
	@echo "make bench  measure this machine: our pipeline beside the usual one"
	@echo "make fuzz   break files and runs at random for 10 minutes (MINUTES=...) and see that all is noticed"
	@echo "make clean  remove the virtual environment and caches (not data/, not runs/)"

setup: $(READY)

$(READY): requirements.txt
	@echo "Setting up $(VENV): about 2 minutes and 6 GB the first time"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $(READY)

run: $(READY)
	@$(BIN)/python run_notebook.py

test: $(READY)
	@$(BIN)/python -m ruff check . && $(BIN)/python -m ruff format --check .
	@$(BIN)/python -m pytest tests

lint: $(READY)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

bench: $(READY)
	$(BIN)/python -m benchmarks.speed

fuzz: $(READY)
	$(BIN)/python -m tests.fuzz --minutes $(or $(MINUTES),10)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
