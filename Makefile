# make record   install, then train, quantize and score the recipe on this machine, and print the table
# make test     install, then run every test but the long ones
# make soak     the long tests, what they measure into docs/faults.md; then ten minutes of random kills; bench/soak.md
# make lint     style and types;  make clean: what tools left behind
# make bench    install, then time every stage beside a plain baseline; bench/results.md and bench/results.parquet
PYTHON ?= python3
RECIPE ?= laptop
ARGS ?=
BIN := .venv/bin

.PHONY: record test soak lint bench clean
.DEFAULT_GOAL := record

.venv/made:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("hedgemix needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	touch $@

# torch first, by its exact version: an installer then takes a machine's own build of it (a CPU build, say) if there is one.
.venv/torch: .venv/made
	$(BIN)/pip install -q torch==2.13.0
	touch $@

.venv/installed: pyproject.toml .venv/torch
	$(BIN)/pip install -q -e .
	touch $@

.venv/installed-dev: pyproject.toml .venv/torch
	$(BIN)/pip install -q -e '.[dev]'
	touch $@ .venv/installed

record: .venv/installed
	$(BIN)/python pipeline/record.py $(RECIPE) $(ARGS)

# Tests that start a cluster of their own must not share a process with the session's ray.init. Of the others, those that
# run records mostly wait: a process of theirs runs beside one for the rest, and what it printed follows. 5: no test.
test: .venv/installed-dev
	$(BIN)/pytest -m "cluster and not soak" $(ARGS) || test $$? -eq 5
	@log=$$(mktemp); \
	$(BIN)/pytest -m "not cluster and not soak" tests/integration tests/pipeline $(ARGS) > $$log 2>&1 & waiting=$$!; \
	$(BIN)/pytest -m "not cluster and not soak" tests/hedgemix tests/benchmarks tests/repo $(ARGS); one=$$?; \
	wait $$waiting; two=$$?; cat $$log; rm -f $$log; \
	test $$one -eq 5 && exit $$two; test $$two -eq 5 && exit $$one; test $$one -eq 0 && exit $$two; exit $$one

soak: .venv/installed-dev
	mkdir -p bench && rm -f bench/faults.jsonl
	FAULTS_TABLE=$(CURDIR)/bench/faults.jsonl $(BIN)/pytest -m "soak or faults"
	$(BIN)/python -m benchmarks.faults.table bench/faults.jsonl
	$(BIN)/python -m benchmarks.faults.soak $(ARGS)

bench: .venv/installed
	$(BIN)/python -m benchmarks.suite.suite $(ARGS)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find hedgemix pipeline tests -name __pycache__ -type d -prune -exec rm -rf {} +
