PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=
TEST_ARGS ?= -n auto --dist loadgroup
SEED ?= 0
NUM ?= 5000
TUTORIALS ?=
RELEASE_ARGS ?=
START ?= 0
NAME ?= $(notdir $(basename $(wildcard experiments/[a-z]*.py)))
EXPERIMENT_ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow test-device fuzz lint format house docs docs-full tutorials pictures test-docs release-check test-oldest bench experiments certificates bench-scale bench-processes hierarchies simulated robustness public-models encoders clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 12

demo: $(VENV)/.examples  ## run the gap decomposition example (options in DEMO_ARGS)
	$(BIN)/python examples/gap_decomposition.py $(DEMO_ARGS)

test: $(VENV)/.test  ## run the default test suite (options in TEST_ARGS)
	$(BIN)/python -m pytest $(TEST_ARGS)

test-slow: $(VENV)/.test  ## run the slow tests
	$(BIN)/python -m pytest -m "slow and not fake_device" $(TEST_ARGS)

test-device: $(VENV)/.test  ## run the tests of devices without one, on memory of the host (needs a C++ compiler)
	$(BIN)/python -m pytest -m fake_device tests/test_devices.py

fuzz: $(VENV)/.test  ## check random structures (SEED=, NUM= of them, from number START=)
	$(BIN)/python tests/fuzz/run.py --seed $(SEED) --num $(NUM) --start $(START)

lint: $(VENV)/.lint  ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy pyro_amortized

format: $(VENV)/.lint  ## format the code and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

house: $(VENV)/.test  ## print the structure of the package in figures
	$(BIN)/python tests/house.py --rooms

docs: $(VENV)/.docs  ## build the documentation into docs/_build/html
	$(BIN)/sphinx-build -j auto -W --keep-going docs docs/_build/html

docs-full: $(VENV)/.docs  ## the same, with every page and every tutorial executed
	DOCS_FULL=1 $(BIN)/sphinx-build -E -j auto -W --keep-going docs docs/_build/html

tutorials: $(VENV)/.docs  ## execute the tutorials and write their outputs into them (names in TUTORIALS)
	$(BIN)/python docs/execute.py $(TUTORIALS)

pictures: $(VENV)/.docs  ## draw the logo and the pictures of the front pages
	$(BIN)/python docs/pictures.py

test-docs: docs $(VENV)/.site  ## open every page of the built documentation in a headless Chromium
	$(BIN)/python -m pytest -m site tests/test_site.py

release-check: $(VENV)/.release  ## build the distributions and check all that can be without publishing (RELEASE_ARGS=--all)
	$(BIN)/python tests/release.py $(RELEASE_ARGS)

test-oldest:  ## run the default tests with the oldest versions that the package takes, in .venv-oldest
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[test]'
	.venv-oldest/bin/python -m pytest -W ignore::DeprecationWarning -W ignore::FutureWarning \
		-W "ignore:Attempted to insert a get_attr" -W "ignore:Node " $(TEST_ARGS)

bench: $(VENV)/.examples  ## run the benchmarks
	$(BIN)/python benchmarks/run.py

experiments: $(VENV)/.examples  ## the field's claims, tried (one in NAME=, options in EXPERIMENT_ARGS; 10 minutes each)
	for name in $(NAME); do $(BIN)/python experiments/$$name.py $(EXPERIMENT_ARGS) || exit 1; done

bench-scale: $(VENV)/.test  ## time and memory at up to a million datapoints (10 minutes)
	$(BIN)/python benchmarks/scale.py

bench-processes: $(VENV)/.test  ## time and bytes of a training step in one process and in two (20 minutes)
	$(BIN)/python benchmarks/processes.py

encoders: $(VENV)/.examples  ## ready-made encoders against the multilayer perceptron (15 minutes)
	$(BIN)/python benchmarks/encoders.py

hierarchies: $(VENV)/.examples  ## gaps of guides of hierarchies, crossed plates and data sets (15 minutes)
	$(BIN)/python benchmarks/hierarchies.py

simulated: $(VENV)/.examples  ## posteriors of data sets by simulation, beside sbi's where it is installed (20 minutes)
	$(BIN)/python benchmarks/simulated.py

certificates: $(VENV)/.examples  ## certified posteriors against known ones, and their cost against NUTS (an hour)
	$(BIN)/python benchmarks/certificates.py

robustness: $(VENV)/.examples  ## train every guide at every usual learning rate (an hour)
	$(BIN)/python benchmarks/robustness.py

public-models: $(VENV)/.examples  ## train public models with default guides, with their authors' and AutoNormal (hours)
	$(BIN)/python benchmarks/public_models.py

clean:  ## remove the virtual environment and everything built
	rm -rf $(VENV) .venv-oldest build dist *.egg-info docs/_build .coverage .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp per extra: install once, and again when the dependencies or their pins change.
$(VENV)/.examples $(VENV)/.test $(VENV)/.lint $(VENV)/.docs $(VENV)/.release $(VENV)/.site: $(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	@touch $@
