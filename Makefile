# make story          train a small model on the built-in corpus and generate a story
# make test           run all tests
# make lint           check style and import rules
# make test-lowest    run the tests that depend on other libraries, on the lowest versions in setup.cfg
# make test-lowered   run the tests of kernels and numerics as on an older CPU (AVX2, no bfloat16 instructions)
# make common-suite   run transformers' own tests on our models; they are fetched from the package index
# make reliability    run the fault tests and write the table of docs/reliability.md
# make browser        install chromium and npm for the tests of the browser page
PYTHON ?= python3
DATA ?= builtin

BIN := .venv/bin
# pip trusts the certificates of the system, uv only with this variable; the variable has had two names.
UV := UV_SYSTEM_CERTS=1 UV_NATIVE_TLS=1 $(BIN)/uv
# The last part of DATA, including blanks.
name := $(shell basename '$(DATA)')
# configs/quickstart.yaml has the folders of the built-in corpus; another source gets separate folders.
source := $(if $(filter-out builtin,$(DATA)),'--data.source=$(DATA)' '--data.data_dir=data/$(name)' '--output_dir=runs/$(name)')

# Source archives of the newest and lowest transformers: the wheel contains no tests.
newest := .cache/transformers-$(shell sed -n 's/^transformers==//p' constraints.txt)
lowest := .cache/transformers-$(shell sed -n 's/^    transformers >=\([0-9.]*\),<6$$/\1/p' setup.cfg | head -n 1)

.PHONY: story test test-lowest test-lowered common-suite transformers-tests lint reliability clean

story: .venv/installed
	@$(BIN)/python scripts/story.py --config configs/quickstart.yaml $(source)

# One process per core, one file at a time: most of a test's time is the start of a program.
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

# Tests that depend on other libraries, on the lowest versions that setup.cfg allows.
test-lowest: .venv-lowest/installed
	.venv-lowest/bin/python -m pytest -n auto --dist loadfile tests/model tests/generation tests/hub tests/export \
		tests/config tests/test_private_names.py tests/test_smoke.py

# The instruction sets of torch, its libraries and our kernels as on a CPU of 2013 to 2020; on other CPUs than x86 the
# variables of torch do nothing.
lowered := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
	CC="cc$(if $(filter x86_64,$(shell uname -m)), -march=x86-64-v3)"
test-lowered: .venv/installed-dev
	$(lowered) $(BIN)/python -m pytest -n auto tests/kernels/test_training_kernels.py \
		tests/generation/test_decoder.py tests/export/test_native.py tests/export/test_exporters.py

# Import order: its own packages, then those of .venv (torch, pytest), then this checkout.
.venv-lowest/installed: .venv/installed-dev setup.cfg
	$(PYTHON) -m venv --clear --without-pip .venv-lowest
	$(UV) pip compile --quiet --resolution lowest-direct --extra lowest setup.cfg --no-annotate --no-header \
		| grep -vE '^(torch|triton|nvidia-.*)==' > .venv-lowest/requirements.txt
	$(UV) pip install --quiet --no-deps --python .venv-lowest/bin/python -r .venv-lowest/requirements.txt
	@site=$$(.venv-lowest/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
		$(BIN)/python -c 'import os, sysconfig; print(sysconfig.get_path("purelib"), os.getcwd(), sep="\n")' \
		> $$site/shared.pth
	@touch $@

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/codespell

# Write the table of docs/reliability.md from the tests that cause each fault.
reliability: .venv/installed-dev
	$(BIN)/python -m pytest tests/training --reliability docs/reliability.md

clean:
	rm -rf .venv .venv-lowest .cache data runs

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'error: PYTHON ($(PYTHON)): must be Python 3.11 or newer; use make story PYTHON=python3.12' >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python setup.cfg pyproject.toml constraints.txt
	@echo 'installing the package and its pinned dependencies (once; takes minutes)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# Programs for the tests of the browser page. Installation needs root and apt-get; without the programs these
# tests are skipped with a reason.
.PHONY: browser
browser:
	@missing=$$(for program in chromium npm; do command -v $$program >/dev/null || echo $$program; done); \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
		echo "cannot install without root and apt-get:" $$missing; exit 0; \
	fi; \
	apt-get update -qq; for program in $$missing; do \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$program \
			|| echo "cannot install $$program"; \
	done
