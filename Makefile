# make story   train a small model on the built-in corpus and read the story it writes
# make test    run the tests          make lint    check style and layers
# make common-suite   hold the model against transformers' own tests, fetched from the package index
PYTHON ?= python3
DATA ?= builtin

BIN := .venv/bin
# Its last part, blanks and all.
name := $(shell basename '$(DATA)')
# The built-in corpus has its folders in configs/quickstart.yaml; any other source gets its own.
source := $(if $(filter-out builtin,$(DATA)),'--data.source=$(DATA)' '--data.data_dir=data/$(name)' '--output_dir=runs/$(name)')

# The source of the transformers that is installed; its wheel has no tests.
transformers := .cache/transformers-$(shell sed -n 's/^transformers==//p' constraints.txt)

.PHONY: story test common-suite transformers-tests lint reliability clean

story: .venv/installed
	@$(BIN)/python scripts/story.py --config configs/quickstart.yaml $(source)

# A file a process, one process a core: most of a test's time is a program that starts.
test: .venv/installed-dev
	$(BIN)/python -m pytest -n auto --dist loadfile

common-suite: .venv/installed-dev transformers-tests
	$(BIN)/python -m pytest tests/model/test_common_suite.py

transformers-tests: $(transformers)/tests/__init__.py

$(transformers)/tests/__init__.py: | .venv/bin/python
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary transformers \
		--dest .cache $(subst -,==,$(notdir $(transformers)))
	tar -xzf $(transformers).tar.gz -C .cache $(notdir $(transformers))/tests
	@touch $@

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# The table of docs/reliability.md, from the tests that make each fault happen.
reliability: .venv/installed-dev
	$(BIN)/python -m pytest tests/training --reliability docs/reliability.md

clean:
	rm -rf .venv .cache data runs

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'error: Python 3.11 or newer is needed; name one: make story PYTHON=python3.12' >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python setup.cfg pyproject.toml constraints.txt
	@echo 'installing the package and its pinned dependencies (once, some minutes)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# What the tests of the browser page need, for root where there is apt-get. Without it they are skipped, and
# say so.
.PHONY: browser
browser:
	@missing=$$(for program in chromium npm; do command -v $$program >/dev/null || echo $$program; done); \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
		echo "not installed, and only root with apt-get is served here:" $$missing; exit 0; \
	fi; \
	apt-get update -qq; for program in $$missing; do \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$program \
			|| echo "could not be installed: $$program"; \
	done
