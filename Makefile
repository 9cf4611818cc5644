# `make demo` installs everything into .venv and embeds this project's own documentation.
# `make test` installs the tests' needs too and runs what CI runs.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test reference clean

demo:
	$(PYTHON) install.py
	$(BIN)/gguf-embed search "how do I use this without internet?" README.md docs/

test:
	$(PYTHON) install.py --extras cli,dev,plots
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pytest

# The golden vectors, compared live with transformers and sentence-transformers (needs PyTorch).
reference:
	$(PYTHON) install.py --extras cli,dev,reference
	$(BIN)/pytest -m reference

clean:
	rm -rf .venv build dist
