# Two commands do all the set-up: `make demo` and `make test`. See CONTRIBUTING.md.

PATH ?= /usr/local/bin:/usr/bin:/bin
export PATH
# The processes of a test run share compiled code, even if the environment forbids compiled files.
export PYTHONDONTWRITEBYTECODE :=
PYTHON ?= python3
VENV := .venv
DEMO_VENV := .venv-demo
DOCS_VENV := .venv-docs
BIN := $(VENV)/bin
WITH_SERVICES := $(BIN)/python scripts/with_services.py
# Most tests wait for something: seven processes suit two cores. WORKERS=0 is one process, for a debugger.
WORKERS ?= 7
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: demo test unit coverage fuzz mutants lint bench bench-curves chaos dramatiq-suite django-suite docs release-check clean

demo: $(DEMO_VENV)/installed  ## a dozen jobs and their outcomes; needs no server
	$(DEMO_VENV)/bin/python examples/quickstart.py

test: $(VENV)/installed  ## all tests, with real servers; ARGS="-k name" for some
	$(WITH_SERVICES) $(PYTEST) $(ARGS)

unit: $(VENV)/installed  ## the tests without servers
	$(PYTEST) -m "not integration" $(ARGS)

# Tracing sometimes starves a test of real processes. As in .ci/run, failed tests run once more, alone.
TRACED_TESTS = $(BIN)/python -m coverage run -m pytest -q -m "not untraced" $(ARGS)
TRACED_ONCE = $(TRACED_TESTS) -n $(WORKERS) --dist worksteal
coverage: $(VENV)/installed  ## branches covered by all tests that allow a tracer; fails below 95 %
	$(BIN)/python -m coverage erase
	$(WITH_SERVICES) $(TRACED_ONCE) || $(WITH_SERVICES) $(TRACED_TESTS) --last-failed --last-failed-no-failures=none
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report
	$(BIN)/python -m coverage json -q -o build/coverage.json
	$(BIN)/python scripts/branch_coverage.py build/coverage.json

fuzz: export FUZZ_SECONDS ?= 600
fuzz: $(VENV)/installed  ## random input of every kind for ten minutes; FUZZ_SECONDS=60 for less
	$(BIN)/python -m pytest -q tests/project/test_fuzz.py $(ARGS)

mutants: $(VENV)/installed  ## small changes of the code that must fail a test: ARGS="--count 100 rules" for more of one package
	$(WITH_SERVICES) $(BIN)/python scripts/mutate.py $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed  ## speed beside bare and stock Dramatiq, Celery and Sidekiq, in minutes: ARGS=--long for an hour
	$(WITH_SERVICES) $(BIN)/python -m benchmarks.drain $(ARGS)

bench-curves: $(VENV)/installed  ## threads, processes, queue, payload, keys, memory, …: ARGS="threads keys" for a few
	$(WITH_SERVICES) $(BIN)/python -m benchmarks.curves $(ARGS)

chaos: $(VENV)/installed  ## workers and servers killed at random: CHAOS_JOBS=20000 for longer, CHAOS_SEED=1 to repeat a run
	$(BIN)/python -m tests.chaos

dramatiq-suite: $(VENV)/installed  ## Dramatiq's own tests with our bundle: make dramatiq-suite CHECKOUT=../dramatiq
	$(BIN)/python -m pip install --quiet --disable-pip-version-check prometheus-client
	$(WITH_SERVICES) --private $(BIN)/python scripts/dramatiq_suite.py "$(CHECKOUT)" $(ARGS)

django-suite: $(VENV)/installed  ## Django's own tests of task backends with ours, on Python 3.12: make django-suite SOURCE=../django
	$(BIN)/python scripts/django_suite.py "$(SOURCE)" $(ARGS)

release-check:  ## the built package, each extra alone, import time, vulnerabilities
	$(PYTHON) scripts/release_check.py

docs: $(DOCS_VENV)/installed  ## the site, to build/docs; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/python -m mkdocs build --quiet

clean:
	rm -rf .venv .venv.lock .venv-demo .venv-demo.lock .venv-docs .venv-docs.lock build dist htmlcov .coverage* \
		.hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/installed: pyproject.toml
	$(PYTHON) scripts/make_venv.py $(VENV) ".[dev]"

$(DOCS_VENV)/installed: pyproject.toml
	$(PYTHON) scripts/make_venv.py $(DOCS_VENV) ".[docs]"

$(DEMO_VENV)/installed: pyproject.toml
	$(PYTHON) scripts/make_venv.py $(DEMO_VENV) "."
