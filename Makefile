# make demo    set everything up, simulate a small survey, process it to coadds and a picture
# make test    set everything up and run the tests
# make lint    set everything up and check the style of code and workflow
# make set-up  only set everything up
# make science simulate a survey and measure what the workflow makes of it against truth and SWarp
# make bench-quick compare the speed of the main steps with the table of docs/performance.md
# make config  bring the keys and comments of config.yaml up to date with the model
# make test-slurm, make test-pbs: see cluster.mk
#
# PYTHON=python3.12 chooses the interpreter, VENV=/some/folder where the packages go,
# PYTEST_ARGS="-k warp" what is tested, SCIENCE_ARGS="--camera mini --seed 5" the survey of
# make science (SCIENCE_ARGS=--help lists all).

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
SCIENCE_ARGS ?=

BIN := $(VENV)/bin
RUN := PATH="$(abspath $(BIN)):$$PATH"

.PHONY: demo test science bench-quick lint set-up config

demo: $(VENV)/.set-up-demo
	$(RUN) coaddflow simulate configs/demo-survey.yaml data/demo
	$(RUN) coaddflow ingest data/demo/raw
	$(RUN) coaddflow compile
	$(RUN) snakemake --profile profiles/local --quiet rules host reason
	$(RUN) coaddflow status || [ $$? -eq 1 ] # 1: some CCDs failed; it says why
	@ls results/coadd/*.png | sed 's/^/picture: /'

test: $(VENV)/.set-up-test
	$(RUN) python tests/run_all.py $(PYTEST_ARGS)

science: $(VENV)/.set-up-science
	$(RUN) python benchmarks/science $(SCIENCE_ARGS)

bench-quick: $(VENV)/.set-up-test
	$(RUN) python benchmarks/quick.py

lint: $(VENV)/.set-up-test
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) snakefmt --check Snakefile rules
	$(RUN) python tests/lint/snakemake_lint.py

set-up: $(VENV)/.set-up-test

config: $(VENV)/.set-up-demo
	$(RUN) python -m coaddflow.settings.commented config.yaml

# Set up once, and again when the dependencies change
$(VENV)/.set-up-demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[simulate]'
	touch $@

$(VENV)/.set-up-test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@ $(VENV)/.set-up-demo

$(VENV)/.set-up-science: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[science]'
	touch $@ $(VENV)/.set-up-demo

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "coaddflow needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

include cluster.mk
