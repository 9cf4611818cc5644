# `make demo` installs everything into .venv and embeds this project's own documentation.
# `make check` is for every save: format, lint, types, and the tests that need no model.
# `make test` installs the tests' needs too and runs what CI runs.

PYTHON ?= python3
BIN := .venv/bin

# The tests start hundreds of processes: where nothing is kept compiled, each compiles all anew.
unexport PYTHONDONTWRITEBYTECODE

# What the tests need; `make check` leaves it to be installed once.
EXTRAS := arrow,cli,clients,dev,mcp,pdf,plots,server,watch

# Not among the tests of .venv, each with the reason in pyproject.toml.
ELSEWHERE := reference or mteb or minutes or partners
# Collecting them would import the libraries, where they are installed.
NOT_PARTNERS := --ignore=tests/partners
QUICK := not native and not (network or slow or $(ELSEWHERE))

# Tracing branches doubles the time of a test. So tests/conftest.py marks those that reach most of
# them; they run under it once, and those with random examples a second time with all examples.
AS_THEY_ARE := (hypothesis or not traced) and not ($(ELSEWHERE))

# More at a time than there are cores, since many tests wait for a process. The tests of a file stay
# together, for they share what they build. In the order of the files: those of few tests, which
# would come last otherwise, are the slow ones.
WORKERS := $(shell $(PYTHON) -c "import os; print((os.cpu_count() or 1) * 3 // 2)")
SIDE_BY_SIDE := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Least share of branches, in per cent, that the tests reach in each room without side effects.
FLOOR := 95

.PHONY: demo wheels check quick-a-eh-j quick-fgk-z types test all-tests all-types branches mteb reference clean

demo:
	$(PYTHON) install.py
	$(BIN)/gguf-embed search "how do I use this without internet?" README.md docs/

# For machines of this platform without a compiler, whatever their CPU: see --wheelhouse.
wheels:
	$(PYTHON) install.py --wheels wheels

# Types and the halves of the tests run side by side, and each says its own at its end. The types are
# those of the package, where they may have changed; `make test` looks at all, and at the benchmarks.
check:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@$(MAKE) --no-print-directory -j3 -O types quick-a-eh-j quick-fgk-z

# A process for each half collects its own files alone, as pytest-xdist would not. The tests that look
# at the sources (faults, files, layers, quants) are in one of them, which parses them once. What
# they write (40 MB) is kept in memory where there is a folder for it: half of their time is waiting
# for the disk. `make test` writes to the disk.
IN_MEMORY = $(shell df -Pk /dev/shm 2>&1 | awk '$$4 > 200000 && $$6 == "/dev/shm" {print "TMPDIR=" $$6}')

quick-a-eh-j quick-fgk-z: quick-%:
	$(IN_MEMORY) HYPOTHESIS_PROFILE=brief GGUF_EMBED_RANDOM_CALLS=1000 \
	  $(BIN)/pytest -o tmp_path_retention_count=1 -m "$(QUICK)" \
	    --ignore-glob='tests/*/*' --ignore-glob='tests/test_[!$*]*.py'

types:
	$(BIN)/python tests/changed_types.py

test:
	$(PYTHON) install.py --uv --extras $(EXTRAS)
	$(MTEB_VERSIONS) $(PYTHON) install.py --uv --venv build/mteb --extras dev,mteb,server
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory -j4 -O all-tests all-types branches mteb

# mteb brings PyTorch, so it has an environment of its own. The release of PyTorch is named: a machine
# may keep a build of it without CUDA (a twentieth of the size) where pip looks, and uv then looks.
MTEB_VERSIONS = UV_CONSTRAINT=tests/mteb-constraints.txt UV_FIND_LINKS="$(PIP_FIND_LINKS)"

mteb:
	build/mteb/bin/pytest -m mteb tests/test_clients.py tests/test_mteb.py

all-tests:
	$(BIN)/pytest -m "$(AS_THEY_ARE)" $(SIDE_BY_SIDE) $(NOT_PARTNERS)

all-types:
	$(BIN)/pyright --pythonpath $(BIN)/python

# Hypothesis keeps a table of all characters, which takes ten times as long under tracing.
branches:
	$(BIN)/python -c "from hypothesis import strategies; strategies.characters(categories=['Lu']).validate()"
	HYPOTHESIS_PROFILE=quick $(BIN)/pytest -m traced $(NOT_PARTNERS) --cov --cov-report=json:build/coverage.json
	$(BIN)/python tests/coverage_floor.py build/coverage.json $(FLOOR)

# The golden vectors, compared live with transformers and sentence-transformers (needs PyTorch).
reference:
	$(PYTHON) install.py --extras cli,dev,reference,server
	$(BIN)/pytest -m reference

clean:
	rm -rf .venv build dist
