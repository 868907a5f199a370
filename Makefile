# Everything that is done to this project: `make help` lists it. Each target sets up what it needs.
#
#   PYTHON=python3.12 make test        choose the interpreter (3.10 or newer) of a new .venv
#   make test ARGS="tests/unit -x"     pass options on, likewise to run, bench and the tests of memory
#
# Stamp files in the virtual environment say what is up to date: a changed source is compiled before anything
# runs, a changed pyproject.toml installs again.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Processes of pytest: most tests wait for something, so twelve are not too many for two cores.
WORKERS ?= 12
# Each of them imports all tests, and tests start hundreds of interpreters: what one has compiled, the others read.
PYTEST = PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

BIN := $(VENV)/bin
STAMPS := $(VENV)/.kbatch
JOBS := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 1)

CYTHON_SOURCES := $(shell find src -name '*.pyx' -o -name '*.pxd' -o -name '*.pxi')
PYTHON_SOURCES := setup.py noxfile.py src $(wildcard tests benchmarks examples tools)
COMPILED := $(subst /,.,$(patsubst src/%.pyx,%,$(filter %.pyx,$(CYTHON_SOURCES))))
C_SOURCES := $(shell find src -name '*.h')
# Cython's and setuptools' own time stamps do not see a change of these.
FORCING := $(C_SOURCES) setup.py

export PIP_DISABLE_PIP_VERSION_CHECK := 1

# setup.py's switches: whoever measures or tests must not do it on a leftover of these by accident.
unexport DEBUG SANITIZE COVERAGE ANNOTATE QUICK COMPILED

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# --- set-up ---------------------------------------------------------------------------------------------------------

define new_venv # (folder)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "kbatch needs Python 3.10 or newer; choose one with: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(1)
	$(1)/bin/python -m pip install --quiet --require-hashes -r requirements/pip.txt
	mkdir -p $(1)/.kbatch
	touch $(1)/.kbatch/venv
endef

$(STAMPS)/venv:
	$(call new_venv,$(VENV))

# The dependency groups of pyproject.toml as `make lock` has resolved them; `run` is what kbatch itself needs.
$(STAMPS)/%-group: requirements/%.txt $(STAMPS)/venv
	$(BIN)/python -m pip install --quiet --require-hashes -r $<
	@touch $@

# One pip at a time, also with -j: what needs no compiler is installed while one works.
$(STAMPS)/run-group: | $(STAMPS)/compile-group
$(STAMPS)/test-group: | $(STAMPS)/run-group

$(STAMPS)/compiled: $(STAMPS)/compile-group $(CYTHON_SOURCES) $(FORCING)
	$(BIN)/python setup.py --quiet build_ext --inplace --parallel $(JOBS) $(if $(filter $(FORCING),$?),--force)
	@touch $@

# Editable: Python sources are used where they are. COMPILED: else it compiles all of it once more, into a folder that
# it throws away.
# Without an index, so that it fails if the lock lacks something.
$(STAMPS)/installed: $(STAMPS)/compiled $(STAMPS)/run-group pyproject.toml setup.py src/kbatch/_version.py
	$(if $(filter-out $(STAMPS)/compiled,$?),COMPILED=1 $(BIN)/python -m pip install --quiet --no-index --no-build-isolation --editable '.[cli]')
	@touch $@

.PHONY: build
build: $(STAMPS)/installed ## Make .venv, compile, install (what the other targets do first)

.PHONY: build-tests
build-tests: build $(STAMPS)/test-group ## And install what the tests need (with -j 2: while it compiles)

# --- use and test ---------------------------------------------------------------------------------------------------

.PHONY: run
run: build ## Run the demo: 200,000 orders into an embedded Kafka and back
	$(BIN)/kbatch demo $(ARGS)

.PHONY: run-outbox
run-outbox: build ## Run the demo of the outbox: 100,000 orders in SQLite, relays that are killed, all of it in Kafka (40 s)
	$(BIN)/kbatch outbox demo $(ARGS)

.PHONY: run-inbox
run-inbox: build ## Run the demo of the inbox: 100,000 orders through outbox, relay, Kafka, listener and inbox, which are killed (45 s)
	$(BIN)/kbatch inbox demo $(ARGS)

# One process rewrites the assertions of all tests; else each of the twelve does it.
$(STAMPS)/tests-compiled: $(STAMPS)/installed $(STAMPS)/test-group $(shell find tests -name '*.py' 2>/dev/null)
	$(PYTEST) --collect-only -qq --ignore=tests/kafka > $(STAMPS)/collected || { cat $(STAMPS)/collected; exit 1; }
	@touch $@

.PHONY: test
test: build $(STAMPS)/tests-compiled ## Run the tests that need no Java, WORKERS=12 processes side by side (5 to 7 minutes)
	$(PYTEST) -n $(WORKERS) --dist worksteal --ignore=tests/kafka $(ARGS)

.PHONY: test-kafka
test-kafka: build $(STAMPS)/test-group ## Run the tests on Apache Kafka, which they start (Java, Maven)
	$(PYTEST) -n 2 --dist loadfile tests/kafka $(ARGS)

.PHONY: compliance
compliance: build $(STAMPS)/test-group ## Run the compliance suite, put its results into docs/compliance.md; KAFKA=1: on Apache Kafka, too
	$(BIN)/python -m tools.compliance mock $(if $(KAFKA),kafka)

.PHONY: test-all
test-all: test test-kafka ## Run both

.PHONY: mutants
mutants: build $(STAMPS)/test-group ## Plant defects, one at a time, and see whether the tests find each, two at a time (90 minutes)
	$(BIN)/python -m tests.mutants $(ARGS)

.PHONY: soak
soak: build $(STAMPS)/test-group ## Run 3,000 seeded fault plans, shorten one that fails (ARGS="--seeds 0:100000 --jobs 4", "--outbox sqlite", "--whole sqlite")
	$(BIN)/python -m tests.faults.soak $(ARGS)

.PHONY: soak-kafka
soak-kafka: build $(STAMPS)/test-group ## Run 100 seeded fault plans on real brokers (ARGS="--seeds 0:1000", "--whole sqlite")
	$(BIN)/python -m tests.faults.soak --kafka $(ARGS)

.PHONY: nightly
nightly: build $(STAMPS)/test-group ## The tests on Kafka with more of what takes long: five rolling restarts, 96 seeds; 3,000 plans of relays that are killed, 2,500 whole histories
	KBATCH_NIGHTLY=1 $(BIN)/python -m pytest tests/kafka tests/mock/test_relay_database_faults.py $(ARGS)
	$(BIN)/python -m tests.faults.soak --outbox sqlite --seeds 0:2000
	$(BIN)/python -m tests.faults.soak --outbox postgres --seeds 0:1000
	$(BIN)/python -m tests.faults.soak --whole sqlite --seeds 0:2000 --jobs 8
	$(BIN)/python -m tests.faults.soak --whole postgres --seeds 0:500 --jobs 8

.PHONY: bench
bench: build $(STAMPS)/bench-group ## Run the benchmarks, print their ratios, draw plots; KAFKA=1: on a real Kafka (Java, Maven)
	$(BIN)/python -m benchmarks.run $(if $(KAFKA),--kafka) $(ARGS)

.PHONY: bench-check
bench-check: build $(STAMPS)/bench-group ## A short benchmark (a minute): fail if a ratio is under half of its target
	$(BIN)/python -m benchmarks.run --quick --only loops --patience 0 --check $(ARGS)

.PHONY: bench-docs
bench-docs: build $(STAMPS)/bench-group ## Put results into docs/benchmarks.md: ARGS="benchmarks/results/…/kafka.json"
	$(BIN)/python -m benchmarks.docs $(ARGS)

.PHONY: bench-test
bench-test: build $(STAMPS)/test-group $(STAMPS)/bench-group ## Test the benchmarks themselves: plots, the proxy
	$(BIN)/python -m pytest benchmarks/tests $(ARGS)

.PHONY: bench-instructions
bench-instructions: build $(STAMPS)/bench-group ## Count instructions per envelope, with valgrind
	$(BIN)/python -m benchmarks.instructions $(ARGS)

.PHONY: bench-micro
bench-micro: build $(STAMPS)/bench-group ## pytest-benchmark, for work on one part
	$(BIN)/python -m pytest benchmarks/micro $(ARGS)

BASE ?= HEAD~1
.PHONY: bench-compare
bench-compare: build $(STAMPS)/bench-group ## Fail if BASE=HEAD~1 was faster by more than 15 %, as a ratio to the C loop
	$(BIN)/python -m benchmarks.compare --base $(BASE) $(ARGS)

# --- checks ---------------------------------------------------------------------------------------------------------

.PHONY: lint
lint: build $(STAMPS)/lint-group ## ruff, cython-lint; of the workflows: schema, zizmor, cibuildwheel's list of builds
	$(BIN)/ruff check $(PYTHON_SOURCES)
	$(BIN)/ruff format --check $(PYTHON_SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/cython-lint --max-line-length 120 src
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/zizmor --offline --quiet --persona auditor .github
	$(BIN)/python -m tools.builds

.PHONY: format
format: build $(STAMPS)/lint-group ## Let ruff mend what it can
	$(BIN)/ruff check --fix $(PYTHON_SOURCES)
	$(BIN)/ruff format $(PYTHON_SOURCES)

.PHONY: types
types: build $(STAMPS)/lint-group $(STAMPS)/test-group $(STAMPS)/bench-group $(STAMPS)/build-group ## mypy --strict: package, benchmarks, tests/typing
	$(BIN)/mypy --strict src/kbatch src/pytest_kbatch.py benchmarks tools noxfile.py $(wildcard tests/typing/*.py)

.PHONY: stubtest
stubtest: build $(STAMPS)/lint-group $(STAMPS)/test-group ## The .pyi files against the compiled modules
	$(BIN)/python -m mypy.stubtest $(COMPILED) --allowlist tests/typing/stubtest_allowlist.txt --ignore-unused-allowlist

# --- builds of their own, each in its own environment, from a copy of the sources -----------------------------------

ASAN_VENV := .venv-asan
ASAN_TREE := build/asan
CC ?= cc

$(ASAN_VENV)/.kbatch/venv:
	$(call new_venv,$(ASAN_VENV))

$(ASAN_VENV)/.kbatch/installed: $(ASAN_VENV)/.kbatch/venv $(CYTHON_SOURCES) $(FORCING) pyproject.toml \
		$(shell find src -name '*.py' -o -name '*.pyi')
	$(ASAN_VENV)/bin/python -m pip install --quiet --require-hashes $(foreach group,compile run test,-r requirements/$(group).txt)
	rm -rf $(ASAN_TREE) && mkdir -p $(ASAN_TREE)
	cp -R pyproject.toml setup.py README.md LICENSE src $(ASAN_TREE)/
	find $(ASAN_TREE) \( -name '*.so' -o -name '*.egg-info' -o -name __pycache__ -o -name '*.c' \) -prune -exec rm -rf {} +
	SANITIZE=1 $(ASAN_VENV)/bin/python -m pip install --quiet --no-index --no-build-isolation './$(ASAN_TREE)[cli]'
	@touch $@

# Leaks are left to the suite's own counters: CPython's and librdkafka's globals would drown them. libstdc++ is loaded
# beside the sanitizer, which finds no other way to pass on what greenlet throws.
.PHONY: asan
asan: $(ASAN_VENV)/.kbatch/installed ## Run the tests on a build with the address and undefined-behaviour sanitizers
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libstdc++.so.6)" PYTHONMALLOC=malloc KBATCH_SLOW_BUILD=1 \
		ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
		$(ASAN_VENV)/bin/python -m pytest $(ARGS)

# The next ones use .venv, but its compiled modules: they come from a tree that PYTHONPATH puts first.

build/%/compiled: $(STAMPS)/installed $(STAMPS)/test-group $(CYTHON_SOURCES) $(FORCING) \
		$(shell find src -name '*.py' -o -name '*.pyi')
	rm -rf $(@D) && mkdir -p $(@D)
	cp -R setup.py pyproject.toml README.md LICENSE src $(@D)/
	find $(@D) \( -name '*.so' -o -name '*.egg-info' -o -name __pycache__ -o -name '*.c' \) -prune -exec rm -rf {} +
	cd $(@D) && $(SWITCHES) $(abspath $(BIN))/python setup.py --quiet build_ext --inplace --parallel $(JOBS)
	@touch $@

build/debug/compiled: SWITCHES := DEBUG=1
build/tsan/compiled: SWITCHES := SANITIZE=thread

.PHONY: memory
memory: build/debug/compiled ## Let each allocation fail in turn, ours and Python's, on a debug build
	PYTHONPATH=build/debug/src $(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests/memory $(ARGS)

LEAK_TESTS := tests/memory/test_native_allocations.py \
	tests/mock/test_stored_records.py::test_sending_leaks_nothing "tests/mock/test_stored_records.py::test_the_error_path_leaks_nothing[kbatch-25]"

# What is uninitialised is not looked for: CPython's own strings and its parser would drown it.
.PHONY: valgrind
valgrind: build/debug/compiled ## Run the tests of leaks under valgrind: what is lost, what is read after it was freed
	PYTHONPATH=build/debug/src PYTHONMALLOC=malloc valgrind -q --error-exitcode=9 --num-callers=20 \
		--undef-value-errors=no --leak-check=full --show-leak-kinds=definite --errors-for-leak-kinds=definite \
		--suppressions=tests/memory/valgrind.supp --gen-suppressions=all --trace-children=no \
		$(BIN)/python -m pytest -p no:cacheprovider --timeout 0 $(if $(ARGS),$(ARGS),$(LEAK_TESTS))

.PHONY: tsan
tsan: build/tsan/compiled ## Let threads do everything at once to a producer and a consumer, under ThreadSanitizer
	$(BIN)/python -m tests.races build/tsan/src $(ARGS)

.PHONY: fuzz
fuzz: build $(STAMPS)/test-group ## Compare nasty envelopes with the reference: ARGS="--envelopes 10000000 --seed 7"
	$(BIN)/python -m tests.fuzz $(ARGS)

LOCKED_GROUPS := compile test test-free-threaded bench lint build pip lock
LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-annotate \
	--custom-compile-command 'make lock'

# One resolution, which the one of each file begins with, so that the files agree.
.PHONY: lock
lock: $(STAMPS)/lock-group ## Renew requirements/: versions and hashes of what is installed to build and test, for all CPythons
	rm -rf build/lock && mkdir -p build/lock
	$(LOCK) pyproject.toml --extra cli --group dev --output-file build/lock/all
	for name in run $(LOCKED_GROUPS); do cp build/lock/all build/lock/$$name.txt; done
	$(LOCK) pyproject.toml --extra cli --output-file build/lock/run.txt
	for group in $(LOCKED_GROUPS); do $(LOCK) --group $$group --output-file build/lock/$$group.txt; done
	cp build/lock/*.txt requirements/

.PHONY: wheel
wheel: $(STAMPS)/build-group ## sdist, and for each CPython here a wheel, checked, installed, tested (10 minutes each; TESTS=tests/unit: 8 in all)
	$(BIN)/nox --parallel $(if $(TESTS),$(JOBS),1) $(ARGS) -- $(TESTS)

.PHONY: clean
clean: ## Remove everything that was made
	rm -rf .venv .venv-asan .nox build dist wheelhouse src/*.egg-info
	rm -rf .hypothesis .pytest_cache .mypy_cache .ruff_cache .benchmarks benchmarks/build
	find src \( -name '*.so' -o -name '*.c' -o -name '*.html' \) -delete
	find $(wildcard src tests benchmarks tools) -name __pycache__ -prune -exec rm -rf {} +
