# Two commands are enough to begin with: `make demo` shows the server at work, `make test` runs the tests. Every target
# sets up what it needs in .venv*; PYTHON chooses the interpreter, PYTHONS those of `test`.

PYTHON ?= python3

.PHONY: help demo test check bench stress clean

help:
	@echo "make demo    a real server with 200 simulated clients and live figures, until Ctrl-C"
	@echo "make test    the tests, on every CPython 3.11 to 3.14 that is found (PYTHONS='...' to choose)"
	@echo "make check   ruff, mypy, stubtest, the core with warnings as errors, and the wheel and sdist"
	@echo "make bench   the benchmarks, one after the other (BENCH=name for one, ARGS='--json FILE')"
	@echo "make stress  sanitizers, free-threaded CPython, long runs of the random tests (about an hour)"
	@echo "make clean   remove environments and build products"

demo:
	@.ci/demo $(PYTHON)

test:
	@.ci/test $(PYTHONS)

check:
	@.ci/check $(PYTHON)

bench:
	@.ci/bench $(PYTHON) "$(BENCH)" $(ARGS)

stress:
	@.ci/stress $(PYTHON)

clean:
	rm -rf .venv* .work build dist *.egg-info csrc/_core.c csrc/_fanout.c csrc/_health.c csrc/_metadata.c wsfast/_*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
