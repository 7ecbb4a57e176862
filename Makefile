# make story          train a small model on the built-in corpus and generate a story; DATA=PATH or a Hub id: on that
#                     corpus; MINUTES=10: the best model that ten minutes allow on this machine; MORE=10: train ten
#                     minutes more; TORCH=default, cpu, cu126, ...: with that build of
#                     torch (see install.py)
# make test           run the tests, without those that are marked slow
# make test-all       run all tests but those of a real Slurm
# make test-weekly    run the tests that take longest; execute the notebooks, with the answers to their exercises
# make test-slurm     run those of the job scripts on a real Slurm, which mostly wait
# make lint           check style and import rules
# make test-lowest    run the tests that depend on other libraries, on the lowest versions in setup.cfg
# make test-lowered   run the tests of kernels and numerics as on an older CPU (AVX2, no bfloat16 instructions)
# make test-research  run the tests of other tools (docs/tools.md) in an environment of its own
# make common-suite   run transformers' own tests on our models; they are fetched from the package index
# make reliability    run the fault tests and write the table of docs/reliability.md
# make notebooks      write and execute the notebooks from notebooks/source
# make browser        install chromium and npm for the tests of the browser page
# make slurm          install Slurm for the tests of the job scripts, and name their two nodes in /etc/hosts
PYTHON ?= python3
# Recipes receive these as environment variables, so that neither make nor the shell interprets their characters.
override DATA := $(value DATA)
override TORCH := $(value TORCH)
override MORE := $(value MORE)
override MINUTES := $(value MINUTES)
export DATA TORCH MORE MINUTES

BIN := .venv/bin
# pip trusts the certificates of the system, uv only with this variable; the variable has had two names.
UV := UV_SYSTEM_CERTS=1 UV_NATIVE_TLS=1 $(BIN)/uv
requirements := setup.cfg pyproject.toml constraints.txt install.py

# Source archives of the newest and lowest transformers: the wheel contains no tests.
newest := .cache/transformers-$(shell sed -n 's/^transformers==//p' constraints.txt)
lowest := .cache/transformers-$(shell sed -n 's/^    transformers >=\([0-9.]*\),<6$$/\1/p' setup.cfg | head -n 1)

.PHONY: story test test-all test-slurm test-weekly test-lowest test-lowered test-research common-suite transformers-tests lint reliability
.PHONY: notebooks clean

story: .venv/installed
	@$(BIN)/python scripts/story.py --data.source="$${DATA:-builtin}" $${MINUTES:+--minutes="$$MINUTES"} \
		$${MORE:+--more="$$MORE"}

# One process per core, one file at a time.
PYTEST := -m pytest -n auto --dist loadfile --no-loadscope-reorder
# Every script once. With the newest versions, tests/test_wheel.py does the same.
smoke := tests/test_smoke.py
cluster := tests/launch/test_slurm_cluster.py
# Long files first, so that no core waits for another at the end.
order := tests/test_wheel.py tests/training tests

test: .venv/installed-dev
	@echo 'running the tests: about 8 minutes on two cores'
	$(BIN)/python $(PYTEST) --ignore $(smoke) -m 'not slow'

test-all: .venv/installed-dev
	$(BIN)/python $(PYTEST) --ignore $(smoke) --ignore $(cluster) -m 'not weekly' --durations 25 $(order)

# They take minutes and depend on little else.
test-weekly: .venv/installed-dev
	$(BIN)/python -m pytest -m weekly

test-slurm: .venv/installed-dev
	$(BIN)/python -m pytest $(cluster)

common-suite: .venv/installed-dev transformers-tests
	$(BIN)/python -m pytest tests/model/test_common_suite.py

transformers-tests: $(newest)/tests/__init__.py $(lowest)/tests/__init__.py

.cache/transformers-%/tests/__init__.py: | .venv/installed-dev
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary transformers \
		--dest .cache transformers==$*
	tar -xzf .cache/transformers-$*.tar.gz -C .cache transformers-$*/tests
	@touch $@

# Tests that depend on other libraries, on the lowest versions that setup.cfg allows.
test-lowest: .venv-lowest/installed
	.venv-lowest/bin/python $(PYTEST) -m 'not slow' tests/model tests/generation tests/hub tests/export \
		tests/config tests/test_private_names.py $(smoke)

# The instruction sets of torch, its libraries and our kernels as on a CPU of 2013 to 2020; on other CPUs than x86 the
# variables of torch do nothing.
lowered := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
	CC="cc$(if $(filter x86_64,$(shell uname -m)), -march=x86-64-v3)"
test-lowered: .venv/installed-dev
	$(lowered) $(BIN)/python -m pytest -n auto -m 'not slow' tests/kernels \
		tests/generation/test_decoder.py tests/export/test_native.py tests/export/test_exporters.py

# Tests of the tools in docs/tools.md, which need a gigabyte of packages.
test-research: .venv-research/installed
	.venv-research/bin/python $(PYTEST) tests/tools tests/export/test_ecosystem.py tests/benchmarks/test_grpo.py

.venv-research/installed: .venv/installed-dev setup.cfg constraints.txt constraints-research.txt
	$(UV) venv --quiet --clear --python $(PYTHON) .venv-research
	$(UV) pip install --quiet --python .venv-research/bin/python -c constraints.txt -c constraints-research.txt \
		-e '.[export,serve,finetune,research]' hypothesis pytest pytest-xdist
	@touch $@

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

# Write notebooks/*.ipynb from notebooks/source, and execute them.
notebooks: .venv/installed-dev
	$(BIN)/python notebooks/build_notebooks.py

# data/ and runs/ stay: they contain trained models and files of the user.
clean:
	rm -rf .venv .venv-lowest .venv-research .cache

# An environment runs the code of the folder that it was created in. In a moved or copied project, or with
# TORCH=default, cpu, cu126, ..., install.py runs again. It prints its progress.
is_moved := $(shell [ "$$(cat .venv/root 2>/dev/null)" = "$$(pwd -P)" ] || echo yes)
.venv/installed: $(requirements) .venv/bin/python $(if $(TORCH)$(is_moved),force)
	@$(PYTHON) install.py --torch="$$TORCH"
	@touch $@

.venv/installed-dev: $(requirements) .venv/bin/python $(if $(is_moved),force)
	@$(PYTHON) install.py --extra dev --torch="$$TORCH"
	@touch .venv/installed $@

# Missing or a link to a Python that was removed: the rules above run again.
.venv/bin/python: ;

.PHONY: force
force:

# Programs for the tests of the browser page, and Slurm for those of the job scripts. Installation needs root and
# apt-get; without the programs these tests are skipped with a reason.
.PHONY: browser slurm
browser:
	@$(call install,chromium npm,chromium npm)

slurm:
	@$(call install,slurmctld slurmd munged,slurm-wlm munge)
	@if [ "$$(id -u)" = 0 ] && ! getent hosts n2 >/dev/null; then echo "127.0.0.1 n1 n2" >> /etc/hosts; fi

# Install packages (2) if a program (1) is missing.
define install
	missing=$$(for program in $(1); do command -v $$program >/dev/null || echo $$program; done); \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
		echo "cannot install without root and apt-get:" $$missing; exit 0; \
	fi; \
	apt-get update -qq; for package in $(2); do \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$package \
			|| echo "cannot install $$package"; \
	done
endef
