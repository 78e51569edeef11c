# Every target installs what it needs: a fresh clone needs only Python ≥ 3.11, pip and a package index.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test test-quick lint docs docs-outputs notebooks clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "interp needs Python 3.11 or newer; try: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	$(BIN)/python -m headstats.cpu --if-missing --if-possible  # needs a C++ compiler; everything else works without one
	touch $@

demo: $(STAMP)  ## the main job on the embedded model; results and report.html in results/demo
	$(BIN)/interp demo $(ARGS)

# Two processes of one thread each; the files of tests are shared out among them (see tests/conftest.py).
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=10

test: $(STAMP)  ## all tests that need no GPU (downloads the embedded model on first use)
	$(PYTEST) $(ARGS)

test-quick: $(STAMP)  ## the fast tests: a few minutes, no model to download
	$(PYTEST) -m "not slow and not model and not browser" $(ARGS)

lint: $(STAMP)  ## style, types, and the scripts of the report page
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	cd interp/plots/page && ../../../$(BIN)/deno lint -q --config deno.json . && ../../../$(BIN)/deno check -q --config deno.json *.js

docs: $(STAMP)  ## the documentation in site/ (for its search, run python -m http.server -d site); a broken link or name is an error
	$(BIN)/zensical build --clean --strict

docs-outputs: $(STAMP)  ## run the code of every page, and write what it prints below it
	$(BIN)/python experiments/doc_outputs.py

notebooks: $(STAMP)  ## run every notebook and store its outputs
	$(BIN)/python notebooks/refresh.py $(ARGS)

clean:  ## remove the environment, the built documentation, caches and results
	rm -rf site $(VENV) .pytest_cache .ruff_cache .hypothesis results
