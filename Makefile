# `make demo` and `make test` each do all the set-up they need, in .venv of this checkout.
PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint check slow clean
.DELETE_ON_ERROR:

demo: .venv/.train           ## train seven methods on real data and print one table (about two minutes on two cores)
	.venv/bin/weft compare --resume

test: lint check             ## everything that CI runs

lint: .venv/.dev
	.venv/bin/ruff check src tests scripts
	.venv/bin/mypy

check: .venv/.dev
	.venv/bin/python -m pytest -n 2

slow: .venv/.dev             ## the checks that take minutes
	.venv/bin/python -m pytest -n 2 -m slow

clean:
	rm -rf .venv weft-compare .mypy_cache .ruff_cache .pytest_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Weft needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv

# torch first: the pinned release, before any range of another package can ask for a newer one
.venv/.torch: constraints.txt | .venv/bin/python
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	touch $@

.venv/.train: .venv/.torch pyproject.toml
	$(PIP) -e '.[train]'
	touch $@

.venv/.dev: .venv/.torch pyproject.toml
	$(PIP) -e '.[dev]'
	touch $@
