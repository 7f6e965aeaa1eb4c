# make train   set up .venv if needed and train the default model on real data (about a minute on a CPU)
# make test    set up .venv if needed and run the tests (no GPU needed)
# make test-oldest  the tests under the lowest versions that pyproject.toml allows, in an environment of their own
# make lint    ruff and pyright
# make gpu     everything that we want to know from a GPU, in seven minutes (ARGS=--rehearse without one)
# make build-all  every kernel for every chip that Triton knows, under its oldest and its newest version (an hour)
# make docs    the documentation as a site in build/site, with a page for every mixer, op and model family (minutes)
# make bench   side-by-side measurements against peers
# make clean   remove .venv, caches and build products; runs/ stays

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
ARGS ?=

OLDEST := $(VENV)-oldest

.PHONY: train test test-slow test-oldest lint gpu build-all docs bench clean
.DELETE_ON_ERROR:

# One environment, reused while the two packaging files stay as they are.
$(VENV)/.base: pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mixerzoo needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e .
	@touch $@

$(VENV)/.test: $(VENV)/.base
	$(BIN)/python -m pip install -q -e '.[test]'
	@touch $@

$(VENV)/.docs: $(VENV)/.base
	$(BIN)/python -m pip install -q -e '.[docs]'
	@touch $@

train: $(VENV)/.base
	$(BIN)/python train.py $(ARGS)

# One thread per worker: two workers with two threads each would fight for two cores.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

test-slow: $(VENV)/.test $(VENV)/.docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m slow $(ARGS)

# The lowest versions of what we ask for by name; pip finds what these need.
$(OLDEST)/.test: pyproject.toml setup.py tools/oldest.py
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q --upgrade pip
	$(OLDEST)/bin/python tools/oldest.py > $(OLDEST)/lowest.txt
	$(OLDEST)/bin/python -m pip install -q -c $(OLDEST)/lowest.txt -e '.[test]'
	@touch $@

test-oldest: $(OLDEST)/.test
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

gpu: $(VENV)/.test
	PYTHON=$(BIN)/python tools/gpu.sh $(ARGS)

OLDEST_TRITON := 3.6
build-all: $(VENV)/.test
	$(BIN)/python -m pip install -q --no-deps --upgrade --target $(VENV)/oldest 'triton==$(OLDEST_TRITON).*'
	PYTHONPATH=$(VENV)/oldest $(BIN)/python -m mixerzoo.tools.build --all $(ARGS)
	$(BIN)/python -m mixerzoo.tools.build --all $(ARGS)

# NO_MKDOCS_2_WARNING: the versions are pinned
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=true $(BIN)/python -m mkdocs build $(ARGS)
	@echo "build/site/index.html; with search: $(BIN)/python -m http.server -d build/site"

bench: $(VENV)/.test
	$(BIN)/python -m mixerzoo.benchmarks.vision
	$(BIN)/python -m mixerzoo.benchmarks.mixers
	$(BIN)/python -m mixerzoo.benchmarks.sequence

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
