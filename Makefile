# make story   train a small model on the built-in corpus and read the story it writes
# make test    run the tests          make lint    check style and layers
# make test-lowest    the tests that depend on other libraries, on the lowest versions that setup.cfg allows
# make common-suite   hold the model against transformers' own tests, fetched from the package index
PYTHON ?= python3
DATA ?= builtin

BIN := .venv/bin
# Its last part, blanks and all.
name := $(shell basename '$(DATA)')
# The built-in corpus has its folders in configs/quickstart.yaml; any other source gets its own.
source := $(if $(filter-out builtin,$(DATA)),'--data.source=$(DATA)' '--data.data_dir=data/$(name)' '--output_dir=runs/$(name)')

# The sources of both ends of transformers' range, as its wheel has no tests.
newest := .cache/transformers-$(shell sed -n 's/^transformers==//p' constraints.txt)
lowest := .cache/transformers-$(shell sed -n 's/^    transformers >=\([0-9.]*\),<6$$/\1/p' setup.cfg | head -n 1)

.PHONY: story test test-lowest common-suite transformers-tests lint reliability clean

story: .venv/installed
	@$(BIN)/python scripts/story.py --config configs/quickstart.yaml $(source)

# A file a process, one process a core: most of a test's time is a program that starts.
test: .venv/installed-dev
	$(BIN)/python -m pytest -n auto --dist loadfile

common-suite: .venv/installed-dev transformers-tests
	$(BIN)/python -m pytest tests/model/test_common_suite.py

transformers-tests: $(newest)/tests/__init__.py $(lowest)/tests/__init__.py

.cache/transformers-%/tests/__init__.py: | .venv/bin/python
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary transformers \
		--dest .cache transformers==$*
	tar -xzf .cache/transformers-$*.tar.gz -C .cache transformers-$*/tests
	@touch $@

# What depends on other libraries' versions, on the lowest that setup.cfg allows.
test-lowest: .venv-lowest/installed
	.venv-lowest/bin/python -m pytest -n auto --dist loadfile tests/model tests/generation tests/hub tests/export \
		tests/test_private_names.py tests/test_smoke.py

# Its own packages come first, then those of .venv (torch, pytest), then this checkout.
.venv-lowest/installed: .venv/installed-dev setup.cfg
	$(PYTHON) -m venv --clear --without-pip .venv-lowest
	$(BIN)/uv pip compile --quiet --resolution lowest-direct --extra lowest setup.cfg --no-annotate --no-header \
		| grep -vE '^(torch|triton|nvidia-.*)==' > .venv-lowest/requirements.txt
	$(BIN)/uv pip install --quiet --no-deps --python .venv-lowest/bin/python -r .venv-lowest/requirements.txt
	@site=$$(.venv-lowest/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
		$(BIN)/python -c 'import os, sysconfig; print(sysconfig.get_path("purelib"), os.getcwd(), sep="\n")' \
		> $$site/shared.pth
	@touch $@

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# The table of docs/reliability.md, from the tests that make each fault happen.
reliability: .venv/installed-dev
	$(BIN)/python -m pytest tests/training --reliability docs/reliability.md

clean:
	rm -rf .venv .venv-lowest .cache data runs

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
