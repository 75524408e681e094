PYTHON ?= python3
BIN := .venv/bin
# Threads that wait by spinning make a small model many times slower when another program wants a core.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo check test newest site clean

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
	$(BIN)/clang-format --dry-run --Werror src/dape/attention/fused/cuda/*.cu*
	$(BIN)/mypy

# The import hook that checks shapes breaks torch.compile and Triton's interpreter: they run without it.
# A process for each core, with one thread: few tests can use more. Tests of a file share their set-up,
# and files keep the order of tests/conftest.py.
SPREAD := -n auto --dist loadfile --no-loadscope-reorder
test: export OMP_NUM_THREADS := 1
test: export PYTHONDONTWRITEBYTECODE := # or each process compiles every module again
test: $(BIN)/.test
	$(BIN)/pytest $(SPREAD) -m "not unhooked" --jaxtyping-packages=dape,beartype.beartype
	$(BIN)/pytest $(SPREAD) -m unhooked $$(grep -rl --include='*.py' mark.unhooked tests)

# The tests of what transformers, PEFT, TRL and the hub meet, with the newest of their releases. The
# environment lies over .venv, which has the oldest, and holds only what differs.
NEWEST := build/newest
newest: export OMP_NUM_THREADS := 1
newest: $(NEWEST)/.done
	$(NEWEST)/bin/python -m pytest $(SPREAD) -m "not unhooked" \
		tests/data/test_hub.py tests/docs/test_readme.py tests/docs/test_longer_contexts.py \
		$$(ls tests/model/test_*.py | grep -v -e schemes -e compile -e exporting -e blocks -e leak)

$(NEWEST)/.done: $(BIN)/.test newest.txt
	$(BIN)/python -m venv --clear $(NEWEST)
	echo "import site; site.addsitedir('$$(realpath $(BIN)/../lib/python3*/site-packages)')" \
		> $$(echo $(NEWEST)/lib/python3*/site-packages)/oldest.pth
	$(NEWEST)/bin/pip install --quiet --upgrade --requirement newest.txt
	touch $@

# The documents as a site, in build/site. `python3 -m http.server -d build/site` shows it.
site: export NO_MKDOCS_2_WARNING := 1
site: $(BIN)/.test
	$(BIN)/python docs/site/pages.py build/pages
	$(BIN)/mkdocs build

# A .venv of an old Python, or without pip, would stay and fail again when the cause is mended.
OLD := dape needs Python 3.11 or later: give one, as in `make demo PYTHON=python3.12`
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("$(OLD)" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

$(BIN)/dape: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(BIN)/.test: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $(BIN)/dape $@

clean:
	rm -rf .venv build data runs
