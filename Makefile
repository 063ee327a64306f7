# make record   install, then train, quantize and score the recipe on this machine, and print the table
# make test     install, then run every test but the long ones
# make quick    style, types and the tests of pure functions, side by side: no Ray, no process; for every few edits
# make soak     the long tests, what they measure into docs/faults.md; then ten minutes of random kills; bench/soak.md
# make lint     style and types;  make clean: what tools left behind
# make bench    install, then time every stage beside a plain baseline; bench/results.md and bench/results.parquet
PYTHON ?= python3
RECIPE ?= laptop
ARGS ?=
BIN := .venv/bin
# Every process of a record imports the same modules: compiled once, also where the shell has turned that off, as images
# of containers do.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: record test quick soak lint bench clean
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

# Two processes of tests side by side, as records wait now and then: one computes; the other runs records, and what it
# printed follows. Tests marked `cluster` start a cluster of their own, which must not share a process with the session's
# ray.init: they come first in the second, in a process of their own that reads only files with the mark. pytest's code 5,
# no test, is an error only if all three say so.
FAST := not cluster and not soak

test: .venv/installed-dev
	@log=$$(mktemp); \
	worst() { for code; do case $$code in 0|5) ;; *) return $$code; esac; done; for code; do test $$code -eq 5 || return 0; done; return 5; }; \
	( $(BIN)/pytest -m "cluster and not soak" $$(grep -l "mark\.cluster" tests/integration/*.py) $(ARGS); one=$$?; \
	$(BIN)/pytest -m "$(FAST)" tests/integration/ tests/pipeline/ tests/repo/ $(ARGS); worst $$one $$? ) > $$log 2>&1 & records=$$!; \
	$(BIN)/pytest -m "$(FAST)" tests/hedgemix/ tests/benchmarks/ $(ARGS); one=$$?; \
	wait $$records; two=$$?; cat $$log; rm -f $$log; worst $$one $$two

# Functions whose tests start no Ray and no process; tests/repo/test_make_quick.py checks that these say so and are many.
QUICK := tests/hedgemix/entropy tests/hedgemix/data tests/hedgemix/model tests/hedgemix/experts tests/hedgemix/mixers \
	tests/hedgemix/artifact/test_format.py tests/hedgemix/quantize/test_gptq.py \
	tests/hedgemix/test_validate.py tests/repo/test_structure.py tests/repo/test_layers.py tests/repo/test_make_quick.py

BESIDE := tests/hedgemix/experts tests/hedgemix/mixers
quick: .venv/installed-dev
	@log=$$(mktemp); { $(MAKE) --no-print-directory lint && \
	$(BIN)/pytest -q -m "$(FAST) and not slow" $(BESIDE) $(ARGS); } > $$log 2>&1 & one=$$!; \
	$(BIN)/pytest -q -m "$(FAST) and not slow" $(filter-out $(BESIDE),$(QUICK)) $(ARGS); two=$$?; \
	wait $$one; one=$$?; cat $$log; rm -f $$log; test $$two -eq 0 && exit $$one; exit $$two

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
