# `make demo` and `make test` do all set-up themselves; they need Python 3.11, make and a C compiler.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_DIR ?= demo

export OMP_NUM_THREADS ?= 1
export DS_ACCELERATOR ?= cpu

.PHONY: install test demo demo-full lint bench chaos leak study study-pretraining clean

install: $(STAMP)

# torch comes first: anything else may otherwise pull in a build with gigabytes of CUDA libraries.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0 -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[demo,dev]" -c constraints.txt
	touch $(STAMP)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What asserts seconds while it trains on several processes has the machine to itself; of all the rest two files run at a time, in the order
# in which they stand here: whole data sets and trainings early, unit tests last, so that neither core waits long for the other. Files that
# start Ray clusters (and wait for them half of the time) come after the others. The first of these, a single test, is the longest by far, and
# a worker whose file has at most two tests left is given another at once: the third, which therefore is a short one.
ALONE := tests/integration/test_ray_train.py
CLUSTERS := $(patsubst %,tests/integration/test_%.py,demo submit ray_executor tune chaos) tests/layout/test_readme.py
TWO := $(BIN)/python -m pytest --durations=25 -n 2 --dist loadfile --no-loadscope-reorder

test: lint
	$(TWO) tests $(addprefix --ignore=,$(ALONE) $(CLUSTERS))
	$(TWO) $(CLUSTERS)
	$(BIN)/python -m pytest --durations=25 $(ALONE)

demo: $(STAMP)
	$(BIN)/draf demo --out $(DEMO_DIR)

demo-full: $(STAMP)
	$(BIN)/draf demo --full --out $(DEMO_DIR)

bench: $(STAMP)
	$(BIN)/python benchmarks/noise.py

# What goes wrong with the loader, between attempts, and while a run trains: docs/troubleshooting.md. Under half an hour on two cores.
chaos: $(STAMP)
	$(BIN)/python benchmarks/chaos.py
	$(BIN)/python benchmarks/protocols.py
	$(BIN)/python benchmarks/chaos_training.py

leak: $(STAMP)
	$(BIN)/python benchmarks/leak.py

# Regret against the planted truth: docs/results.md. About half an hour on two cores.
study: $(STAMP)
	$(BIN)/python benchmarks/planted_truth.py

# With and without pre-training, at shares of the labels: docs/results.md. Needs the eICU demo (docs/data.md); about half an hour.
study-pretraining: $(STAMP)
	$(BIN)/python benchmarks/pretraining.py $(if $(EICU),--eicu $(EICU))

clean:
	rm -rf $(VENV) $(DEMO_DIR) build *.egg-info
