PYTHON ?= python3
BIN := .venv/bin
# Threads that wait by spinning make a small model many times slower when another program wants a core.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo demo-seeds schemes retrofit check test clean

# Two models that differ only in their scheme, from text to a report on how far each one reads.
demo: SEEDS := 0
demo: $(BIN)/dape data/python-stdlib
	$(train_and_evaluate)
	$(BIN)/dape plot $(RUNS) --out runs/demo/report.html

# The same with three seeds each: what results/demo holds.
demo-seeds: SEEDS := 0 1 2
demo-seeds: $(BIN)/dape data/python-stdlib
	$(train_and_evaluate)
	mkdir -p results/demo
	$(BIN)/dape plot $(RUNS) --out results/demo/table.md
	$(BIN)/dape plot $(RUNS) --out results/demo/perplexity.png

# Every encoding, and every form of adapter on one of them: what results/schemes holds.
# Two CPU cores would need a day or more, most of it for the longest windows: meant for a GPU, where
# `make -j 12 schemes` takes minutes.
STEPS := 400
SCHEMES := nope sinusoidal learned rope partial-rope pi ntk dynamic-ntk yarn xpos randomized-rope \
	alibi kerple kerple-power t5 sandwich fire cope transformer-xl \
	dape-nope dape-rope dape-alibi dape-kerple dape-kerple-power dape-t5 dape-sandwich dape-fire \
	dape3-kerple dape5-kerple dape7-kerple dape-add-kerple dape-concat-kerple dape-bias-kerple \
	talking-heads-kerple
schemes: $(SCHEMES:%=runs/schemes/%/evaluation/last.json)
	mkdir -p results/schemes
	$(BIN)/dape plot $(SCHEMES:%=runs/schemes/%) --out results/schemes/table.md

runs/schemes/%/evaluation/last.json: $(BIN)/dape | data/python-stdlib
	$(BIN)/dape train recipes/cpu.yaml --name schemes/$* --training.steps $(STEPS) --model.scheme $*
	$(BIN)/dape eval runs/schemes/$* --lengths 128,512,2048,8192,16384 --blocks 1

data/python-stdlib: $(BIN)/dape
	$(BIN)/dape prepare --out $@

# A RoPE model trained at 512 tokens on data/books, then for 5 % of its steps more: as it is, as YaRN,
# and with DAPE's adapters alone. For a GPU. BASE and TUNE are options for all of either kind. Each
# rate is the best of three or four by the validation loss of seed 0 at 2,048 tokens: 3e-5 to 3e-4 for
# the whole model, to 1e-3 as YaRN, and 3e-3 to 3e-2 for adapters. results/retrofit holds seeds 0 and 1.
BASE :=
TUNE := --training.steps 100
LENGTHS := 512,1024,2048,4096,8192,16384
WHOLE := --model.adapter None --model.train all --optimizer.learning-rate
ADAPTERS := --optimizer.learning-rate 3e-2
YARN := --model.config '{scheme: yarn, scheme_options: {rotation: {factor: 16}}}'
ARMS := plain-512 plain-2048 yarn-2048 dape-512 dape-2048 yarn-dape-2048
plain-512 := $(WHOLE) 1e-4 --training.length 512
plain-2048 := $(WHOLE) 1e-4
yarn-2048 := $(WHOLE) 3e-4 $(YARN)
dape-512 := $(ADAPTERS) --training.length 512
dape-2048 := $(ADAPTERS)
yarn-dape-2048 := $(ADAPTERS) $(YARN)
TUNED = $(foreach seed,$(SEEDS),$(foreach arm,$(ARMS),runs/retrofit/$(arm)-$(seed)))
retrofit: SEEDS := 0 1 2
retrofit: $(BIN)/dape
	$(foreach seed,$(SEEDS),$(BIN)/dape train recipes/retrofit-base.yaml --seed $(seed) $(BASE) &&) true
	$(foreach seed,$(SEEDS),$(foreach arm,$(ARMS),\
		$(BIN)/dape retrofit runs/retrofit/base-$(seed) --recipe recipes/retrofit.yaml --seed $(seed) \
			--name retrofit/$(arm)-{seed} --lengths $(LENGTHS) $(TUNE) $($(arm)) &&)) true
	mkdir -p results/retrofit
	$(BIN)/dape plot $(SEEDS:%=runs/retrofit/base-%) $(TUNED) --out results/retrofit/table.md
	$(BIN)/dape plot $(SEEDS:%=runs/retrofit/base-%) $(TUNED) --out results/retrofit/perplexity.png

RUNS = $(foreach seed,$(SEEDS),runs/demo/kerple-$(seed) runs/demo/dape-kerple-$(seed))
define train_and_evaluate
$(foreach seed,$(SEEDS),$(foreach scheme,kerple dape-kerple,\
	$(BIN)/dape train recipes/demo.yaml --model.scheme $(scheme) --seed $(seed)
	))
	$(BIN)/dape eval $(RUNS)
endef

check: $(BIN)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The import hook that checks shapes breaks torch.compile and Triton's interpreter: they run without it.
test: $(BIN)/.test
	$(BIN)/pytest -m "not unhooked" --jaxtyping-packages=dape,beartype.beartype
	$(BIN)/pytest -m unhooked

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
