PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo

.PHONY: demo demo-seeds check test clean

# Two models that differ only in their scheme, from text to a report on how far each one reads.
demo: $(BIN)/dape
	$(BIN)/dape prepare --out data/python-stdlib
	$(BIN)/dape train recipes/demo.yaml --model.scheme kerple --out $(DEMO)/kerple
	$(BIN)/dape train recipes/demo.yaml --model.scheme dape-kerple --out $(DEMO)/dape-kerple
	$(BIN)/dape eval $(DEMO)/kerple $(DEMO)/dape-kerple
	$(BIN)/dape plot $(DEMO)/kerple $(DEMO)/dape-kerple --report $(DEMO)/report.html

check: $(BIN)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The import hook that checks shapes cannot live with torch.compile: those tests run without it.
test: $(BIN)/.test
	$(BIN)/pytest -m "not compile" --jaxtyping-packages=dape,beartype.beartype
	$(BIN)/pytest -m compile

$(BIN)/python:
	$(PYTHON) -m venv .venv

$(BIN)/dape: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(BIN)/.test: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $(BIN)/dape $@

clean:
	rm -rf .venv data runs
