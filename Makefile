# Every target sets up what it needs.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

export PYTHONUNBUFFERED := 1
export NO_ALBUMENTATIONS_UPDATE := 1

.PHONY: help setup run lab test check lint fuzz bench test-oldest test-colab clean clean-data
.SECONDARY:

help:
	@echo "make run          execute the notebook (S10_PROFILE=quick or full); an interrupted run continues"
	@echo "                  ARGS=--new starts over, ARGS=--publish puts a full run into Results/"
	@echo "make lab          open the notebook in JupyterLab"
	@echo "make test         all checks"
	@echo "make check        lint and the fast tests, 2 to 3 minutes"
	@echo "make lint         ruff's checks and formatting, without changing anything"
	@echo "make fuzz         damaged files and interrupted runs, for 10 minutes"
	@echo "make bench        measure this machine: our pipeline and the usual one (into runs/bench/)"
	@echo "make test-oldest  the tests with the oldest supported versions (Python 3.11, in .venv-oldest)"
	@echo "make test-colab   the tests with Google Colab's versions (Python 3.13, in .venv-colab)"
	@echo "make clean        remove the virtual environments and caches (not data/, not runs/)"
	@echo "make clean-data   remove the decoded copies of image folders from data/"

setup: $(READY)

# tarfile's extraction filter needs 3.11.4.
NEW_ENOUGH := import sys; sys.version_info >= (3, 11, 4) or sys.exit("Python 3.11.4 or newer is needed, this is %d.%d.%d: make PYTHON=python3.12 ..." % sys.version_info[:3])

# What a failed set-up left, perhaps with another Python, is cleared; a finished one is only brought up to date.
$(READY): requirements.txt
	@$(PYTHON) -c '$(NEW_ENOUGH)'
	@echo "Setting up $(VENV): about 2 minutes and 6 GB the first time"
	$(PYTHON) -m venv $(if $(wildcard $@),,--clear) $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $(READY)

run: $(READY)
	@$(BIN)/python run_notebook.py $(ARGS)

lab: $(READY)
	@$(BIN)/jupyter lab Session10.ipynb

# For the processes that tests start: on two cores, two processes with two threads each slow each other down ten times.
test check fuzz test-oldest test-colab: export OMP_NUM_THREADS := 1

test: $(READY) lint
	@$(BIN)/python -m pytest tests

check: $(READY) lint
	@$(BIN)/python -m pytest tests -m "not slow"

lint: $(READY)
	@$(BIN)/python -m ruff check . && $(BIN)/python -m ruff format --check .

fuzz: $(READY)
	@$(BIN)/python -m tests.fuzz --minutes $(or $(MINUTES),10)

bench: $(READY)
	@$(BIN)/python -m benchmarks.speed

# The wanted Python, or PYTHON. Runs it, since pyenv provides a command even for versions that are not active.
wanted_or_own = $(shell if $(1) -c '$(NEW_ENOUGH)' 2>/dev/null; then echo $(1); else echo $(PYTHON); fi)

.venv-oldest/.ready: WANTED := python3.11
.venv-colab/.ready: WANTED := python3.13
.venv-%/.ready: requirements.txt constraints/%.txt
	@python=$(call wanted_or_own,$(WANTED)); $$python -c '$(NEW_ENOUGH)' || exit 1; [ "$$python" = $(WANTED) ] || \
		echo "no $(WANTED) here that is new enough: using $$($$python --version) instead"; \
		echo "Setting up .venv-$* with constraints/$*.txt: about 4 minutes and 6 GB the first time"; \
		$$python -m venv $(if $(wildcard $@),,--clear) .venv-$*
	.venv-$*/bin/python -m pip install --quiet --upgrade pip
	.venv-$*/bin/python -m pip install --quiet -r requirements.txt -c constraints/$*.txt
	@touch $@

test-oldest test-colab: test-%: .venv-%/.ready
	@.venv-$*/bin/python -m pytest tests

clean:
	rm -rf $(VENV) .venv-oldest .venv-colab .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

clean-data:
	@[ -z "$$(ls data/decoded-*.npz 2>/dev/null)" ] && echo "data/ holds no decoded copies" || \
		{ echo "freeing $$(du -ch data/decoded-*.npz | tail -n 1 | cut -f 1):"; rm -fv data/decoded-*.npz; }
