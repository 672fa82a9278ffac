# Every target sets up what it needs.
PYTHON ?= python3
PYTEST := python -m pytest tests
LINTED := train.py predict.py run_notebook.py models utils experiments benchmarks tests $(wildcard Session10.ipynb Appendix.ipynb)

export PYTHONUNBUFFERED := 1
export NO_ALBUMENTATIONS_UPDATE := 1

.PHONY: help run lab test check lint bench test-oldest test-colab clean
.SECONDARY:

help:
	@echo "make run          execute the notebook (S10_PROFILE=quick or full); an unfinished run goes on"
	@echo "                  ARGS=--new starts over, ARGS=--publish puts a full run into Results/"
	@echo "make lab          open the notebook in JupyterLab"
	@echo "make test         all checks; make check: lint and the fast tests; make lint: ruff alone"
	@echo "make bench        measure this machine: the baseline and this project (into runs/bench/)"
	@echo "make test-oldest  the tests with the oldest supported versions (Python 3.11, in .venv-oldest)"
	@echo "make test-colab   the tests with Google Colab's versions (Python 3.13, in .venv-colab)"
	@echo "make clean        remove environments and caches (not data/, not runs/)"

# What a failed set-up left, perhaps with another Python, is cleared. tarfile's extraction filter needs 3.11.4.
define set-up
@$(1) -c 'import sys; sys.exit(sys.version_info < (3, 11, 4) and "Python 3.11.4 or newer is needed: make PYTHON=...")'
@echo "Setting up $(@D) with $$($(1) --version): a few minutes and 6 GB the first time"
@$(1) -m venv $(if $(wildcard $@),,--clear) $(@D)
@$(@D)/bin/python -m pip install --quiet --upgrade pip
@$(@D)/bin/python -m pip install --quiet -r requirements-dev.txt $(2)
@touch $@
endef

.venv/.ready: requirements.txt requirements-dev.txt
	$(call set-up,$(PYTHON))

# The wanted Python if it runs (pyenv has commands that don't), else PYTHON.
or_own = $(shell $(1) -c 'import sys; sys.exit(sys.version_info < (3, 11, 4))' 2>/dev/null && echo $(1) || echo $(PYTHON))

.venv-oldest/.ready: requirements.txt requirements-dev.txt constraints/oldest.txt
	$(call set-up,$(call or_own,python3.11),-c constraints/oldest.txt)

.venv-colab/.ready: requirements.txt requirements-dev.txt constraints/colab.txt
	$(call set-up,$(call or_own,python3.13),-c constraints/colab.txt)

run: .venv/.ready
	@.venv/bin/python run_notebook.py $(ARGS)

lab: .venv/.ready
	@.venv/bin/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS) Session10.ipynb

# For the processes that tests start: two with two threads each on two cores slow each other down ten times.
test check test-oldest test-colab: export OMP_NUM_THREADS := 1

test: .venv/.ready lint
	@.venv/bin/$(PYTEST) $(ARGS)

check: .venv/.ready lint
	@.venv/bin/$(PYTEST) -m "not slow" $(ARGS)

lint: .venv/.ready
	@.venv/bin/python -m ruff check $(LINTED) && .venv/bin/python -m ruff format --check $(LINTED)

bench: .venv/.ready
	@.venv/bin/python -m benchmarks.speed $(ARGS)

test-oldest test-colab: test-%: .venv-%/.ready
	@.venv-$*/bin/$(PYTEST) $(ARGS)

clean:
	rm -rf .venv .venv-oldest .venv-colab .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
