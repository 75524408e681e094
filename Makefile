PYTHON ?= python3
BIN := .venv/bin
# Threads that wait by spinning make a small model many times slower when another program wants a core.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo check test site clean

# Two models that differ only in their scheme, from text to a report on how far each one reads.
# `dape paper demo` is the same with three seeds each, `dape paper list` lists the larger experiments.
RUNS := runs/demo/kerple-0 runs/demo/dape-kerple-0
demo: $(BIN)/dape data/python-stdlib
	$(BIN)/dape train recipes/demo.yaml --model.scheme kerple,dape-kerple
	$(BIN)/dape eval $(RUNS)
	$(BIN)/dape plot $(RUNS) --out runs/demo/report.html

data/python-stdlib: $(BIN)/dape
	$(BIN)/dape prepare --out $@

check: $(BIN)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The import hook that checks shapes breaks torch.compile and Triton's interpreter: they run without it.
# A process for each core, with one thread: few tests can use more. Tests of a file share their set-up,
# and files keep the order of tests/conftest.py.
SPREAD := -n auto --dist loadfile --no-loadscope-reorder
test: export OMP_NUM_THREADS := 1
test: $(BIN)/.test
	$(BIN)/pytest $(SPREAD) -m "not unhooked" --jaxtyping-packages=dape,beartype.beartype
	$(BIN)/pytest $(SPREAD) -m unhooked $$(grep -rl --include='*.py' mark.unhooked tests)

# The documents as a site, in build/site. `python3 -m http.server -d build/site` shows it.
site: export NO_MKDOCS_2_WARNING := 1
site: $(BIN)/.test
	$(BIN)/python docs/site/pages.py build/pages
	$(BIN)/mkdocs build

$(BIN)/python:
	$(PYTHON) -m venv .venv

$(BIN)/dape: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(BIN)/.test: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $(BIN)/dape $@

clean:
	rm -rf .venv build data runs
