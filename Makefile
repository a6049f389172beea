# make demo | test | check | docs | container | lint | clean | help. All of it happens in .venv, built again when the dependencies change.

# The first supported interpreter of these, or your own: make PYTHON=/path/to/python demo
PYTHON ?= $(shell for p in python3.11 python3.12 python3.10 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))' >/dev/null 2>&1 && echo $$p && break; done)

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

DEMO := runs/demo
MARKET := $(DEMO)/market
MARKET_MADE := $(MARKET)/SYNTHETIC.txt

.PHONY: help demo test test-web test-long test-newest check docs container lint clean

help:
	@echo "make demo    install, make a synthetic market, run Kronos, LightGBM and a simple rule on it, compare them in $(DEMO)/"
	@echo "make test    install and run the test suite"
	@echo "make test-web  install Chromium where apt can, and run the tests of the page and its API, all of them"
	@echo "make test-long  run the tests that take most of a minute or more each"
	@echo "make check   install, check style and run the short tests: before each commit"
	@echo "make test-newest  the same with the newest pandas and plotly that setup.cfg allows, in .venv-newest"
	@echo "make docs    install and build the site, without a network; open build/site/index.html"
	@echo "make container  build the image of Containerfile, where docker, podman or buildah runs"
	@echo "make lint    install and check style, public types and known weaknesses (ruff, mypy, bandit)"
	@echo "make clean   remove .venv, the demo's output and caches; your own runs and mlflow.db stay"

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.10, 3.11 or 3.12 found: install one, or make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,docs]'
	@touch $@

# Kept from one demo to the next, made anew only when the code that makes it changes.
$(MARKET_MADE): kronos_qlib/data/demo_market.py | $(INSTALLED)
	rm -rf $(MARKET)
	$(BIN)/kronos-qlib demo-data $(MARKET)

# QLIB_DATA is set here, so that a real store named in the environment is not taken for the demo's.
demo: export QLIB_DATA := $(MARKET)
demo: $(INSTALLED) $(MARKET_MADE)
	rm -rf $(DEMO)/kronos $(DEMO)/ranker  # the last demo's: a folder that holds another training is refused
	$(BIN)/qrun workflows/reversal_demo.yaml
	$(BIN)/qrun workflows/lightgbm_demo.yaml
	$(BIN)/qrun workflows/kronos_demo.yaml
	$(BIN)/qrun workflows/ranker_demo.yaml
	$(BIN)/kronos-qlib compare kronos_demo ranker_demo lightgbm_demo reversal_demo --out $(DEMO)

# Three workers for two cores, as some tests wait; each with one thread, as threads of several workers are in each
# other's way (tests of threads ask for theirs); and bytecode is kept whatever the shell says, as many processes import
# the package.
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder
test test-web test-long test-newest check: export OMP_NUM_THREADS := 1
test test-web test-long test-newest check: export PYTHONDONTWRITEBYTECODE :=
test: $(INSTALLED)
	$(PYTEST)

# Debian's Chromium, as the browsers that playwright fetches want a network of their own; tests skip without it.
test-web: $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,web,mcp,test-web]'
	@command -v chromium chromium-browser google-chrome >/dev/null || \
	  (apt-get update -qq && apt-get install -y -qq chromium) >/dev/null 2>&1 || echo "no Chromium here, and apt has none"
	KRONOS_SLOW=1 $(BIN)/python -m pytest tests/web

# What takes most of a minute or more each, before a release.
test-long: $(INSTALLED)
	KRONOS_SLOW=1 $(PYTEST) -m long

# What constraints.txt holds back for the rest of Qlib, let go.
NEWEST := .venv-newest
test-newest:
	$(PYTHON) -m venv $(NEWEST)
	grep -v -E '^(pandas|plotly)==' constraints.txt > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/python -m pip install --quiet -c $(NEWEST)/constraints.txt -e '.[test,docs]'
	$(NEWEST)/bin/python -m pip list | grep -E '^(pandas|plotly) '
	$(PYTEST:$(VENV)%=$(NEWEST)%)

check: lint
	$(PYTEST) -m "not slow"

# The theme announces its successor on every build; nothing of that concerns these pages.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict  # not --quiet: then warnings are not counted

BASE := python:3.11-slim
container:
	@for builder in docker podman buildah; do \
	  if $$builder info >/dev/null 2>&1 && $$builder pull --quiet $(BASE); then \
	    exec $$builder build --file Containerfile --tag kronos-qlib .; \
	  fi; \
	done; echo "Containerfile is not built: no docker, podman or buildah runs here that can fetch $(BASE)"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/bandit -q -ll -r kronos_qlib  # pip-audit asks an index for what is known of each package: not offline

clean:
	rm -rf $(VENV) .venv-newest $(DEMO) *.egg-info build .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
